"""A real ComfyUI 0.3.75 in a process of its own, as a person starts it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..host.comfy_host import comfy_root

REPOSITORY = Path(__file__).parents[2]
MODELS = Path(__file__).parent / "emulated_models"
SHARED = ("small_qwen.py", "emulated_qwen.py", "small_z_image.py", "emulated_z_image.py")
_STARTED_IN = 180.0
"""Seconds: a busy machine imports PyTorch slowly."""

SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.0.0",
    "Comfy.Workflow.Persist": False,
    "Comfy.Workflow.ShowMissingModelsWarning": True,
    "Comfy.Locale": "en",
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Notification.ShowVersionUpdates": False,
}
"""What a person has chosen who has used it before."""


@dataclass
class ComfyProcess:
    """A running ComfyUI.

    Attributes:
        base: Its base directory: models, input, output, temp, user, custom_nodes.
        url: Where a browser finds it.
    """

    base: Path
    url: str
    _process: subprocess.Popen[bytes]
    _log: IO[bytes]

    @classmethod
    def start(
        cls, base: Path, frontend: Path, *, packages: Path = REPOSITORY / "python"
    ) -> ComfyProcess:
        """Start it and wait until it answers.

        Args:
            base: Its base directory.
            frontend: The page's files.
            packages: The folder that has the first `qwenlora` on Python's path.

        Raises:
            ModuleNotFoundError: ComfyUI is not installed.
            RuntimeError: It did not start; its log is told.
        """
        root = _tree(base / "comfyui")
        (base / "models" / "loras").mkdir(parents=True)
        _install_packs(base / "custom_nodes")
        command = [sys.executable, str(root / "main.py"), "--base-directory", str(base)]
        command += ["--front-end-root", str(frontend)]
        environment = {**os.environ, "PYTHONPATH": str(packages)}
        return cls.launch(base, command, environment)

    @classmethod
    def launch(cls, base: Path, command: list[str], environment: dict[str, str]) -> ComfyProcess:
        """Run a command that starts a ComfyUI, and wait until it answers.

        Raises:
            RuntimeError: It did not start; its log is told.
        """
        port = _free_port()
        options = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-api-nodes"]
        options += ["--disable-auto-launch", "--preview-method", "none"]
        options += ["--database-url", "sqlite:///:memory:"]
        log = (base / "log.txt").open("wb")
        process = subprocess.Popen(
            [*command, *options], stdout=log, stderr=subprocess.STDOUT, cwd=base, env=environment
        )
        running = cls(base, f"http://127.0.0.1:{port}", process, log)
        try:
            running._wait()
            running.choose(**SETTINGS)
        except BaseException:
            running.stop()
            raise
        return running

    @property
    def loras(self) -> Path:
        """The folder whose files are offered as LoRAs."""
        return self.base / "models" / "loras"

    @property
    def log(self) -> str:
        """What it has printed."""
        return (self.base / "log.txt").read_text(errors="replace")

    def request(self, path: str, body: Any = None) -> Any:
        """GET, or POST where there is a body; returns the decoded JSON, or None."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def choose(self, **settings: Any) -> None:
        """Store settings as the settings dialog does; a page that is loaded later has them."""
        self.request("/settings", settings)

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _wait(self) -> None:
        end = time.monotonic() + _STARTED_IN
        while time.monotonic() < end and self._process.poll() is None:
            try:
                self.request("/system_stats")
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
            else:
                return
        raise RuntimeError(f"ComfyUI did not start:\n{self.log[-4000:]}")


def _tree(root: Path) -> Path:
    """ComfyUI's folder without the settings that the package around it left there."""
    root.mkdir(parents=True)
    source = comfy_root()
    for entry in source.iterdir():
        if entry.name == "main.py":
            # It looks for the settings beside its real place.
            shutil.copy(entry, root / entry.name)
        elif entry.name != "extra_model_paths.yaml":
            (root / entry.name).symlink_to(entry)
    return root


def _install_packs(custom_nodes: Path) -> None:
    custom_nodes.mkdir()
    (custom_nodes / "ComfyUI-qwenlora").symlink_to(REPOSITORY, target_is_directory=True)
    models = custom_nodes / "emulated_models"
    shutil.copytree(MODELS, models, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SHARED:
        shutil.copy(REPOSITORY / "tests" / "host" / name, models / name)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
