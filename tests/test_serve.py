"""The example of Ray Serve: two replicas on the CPU, started as its README says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from safetensors.torch import save_file
from torch import ones

import qwenlora

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Loras = Sequence[tuple[str, float]]

pytestmark = [
    pytest.mark.slow,
    # One application serves all tests of this file.
    pytest.mark.xdist_group("serve"),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'ray[serve]'"
    ),
    # A process that is left would keep the next run's ports and memory.
    pytest.mark.skipif(sys.platform != "linux", reason="finds all of Ray's processes in /proc"),
]

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "serve"
README = (EXAMPLE / "README.md").read_text(encoding="utf-8")
STACKS_HELD = 3
BUDGET = 5 << 20
"""Room for the base branches and three LoRAs of the fourteen."""
SAMPLES = 14
STARTED_S = 300
"""A machine that does much else takes long to start ten processes."""


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


SAMPLES_COMMAND, SERVER_COMMAND, *CURL_COMMANDS = readme_commands()


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


@dataclass
class Answer:
    status: int
    body: bytes
    headers: Any

    @property
    def met(self) -> str:
        return str(self.headers["qwenlora-set"])

    @property
    def process(self) -> int:
        return int(self.headers["qwenlora-process"])


class Server:
    """The application in a process of its own, which has processes of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        # Short: Ray makes sockets in it, whose paths may not be longer than 107 bytes.
        self.scratch = Path(tempfile.mkdtemp(prefix="ray"))
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.scratch), "HOME": str(self.scratch)}

    def run(self, command: str, **options: Any) -> Any:
        """A command of the README, in the folder where it is to be given."""
        words = shlex.split(command.replace("8000", str(self.port)))
        if words[0] == "python":
            words[0] = sys.executable
        call = options.pop("call", subprocess.run)
        return call(words, cwd=self.folder, env=self.environment, **options)

    def start(self) -> None:
        command = f"{SERVER_COMMAND} --stacks {STACKS_HELD} --cache-bytes {BUDGET}"
        with self.log.open("wb") as log:
            self.process = self.run(command, call=subprocess.Popen, stdout=log, stderr=log)
        end = time.monotonic() + STARTED_S
        while f"ready at http://127.0.0.1:{self.port}" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def stop(self) -> int:
        """Its exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    def processes(self) -> list[int]:
        """All that it started: they have its environment."""
        mark, found = f"TMPDIR={self.scratch}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    def close(self) -> None:
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def ask(self, loras: Loras = (), **fields: Any) -> Answer:
        named = [{"name": name, "strength": strength} for name, strength in loras]
        body = json.dumps({"prompt": "a lighthouse", "steps": 1, "loras": named} | fields)
        request = Request(
            f"http://127.0.0.1:{self.port}/pictures",
            data=body.encode(),
            headers={"content-type": "application/json"},
        )
        try:
            with urlopen(request, timeout=120) as response:
                return Answer(response.status, response.read(), response.headers)
        except HTTPError as error:
            return Answer(error.code, error.read(), error.headers)

    def painted(self, loras: Loras = (), **fields: Any) -> Answer:
        answer = self.ask(loras, **fields)
        assert answer.status == 200, answer.body
        return answer


@pytest.fixture(scope="module")
def example() -> Iterator[None]:
    """The example's package, which this process can import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, example: None) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve") / "example"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    write_samples(folder)
    server = Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.close()


def write_samples(folder: Path) -> None:
    """Run the README's command here: a process of its own would import diffusers once more."""
    python, option, module, *words = shlex.split(f"{SAMPLES_COMMAND} --count {SAMPLES}")
    assert (python, option) == ("python", "-m")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [module, *words])
        runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.fixture(scope="module")
def studio(example: None) -> Any:
    """The replicas' model, in this process."""
    from qwenlora_serve.pipelines import load_studio
    from qwenlora_serve.settings import PipelineKind

    return load_studio(PipelineKind.EMULATED)


def order(**fields: Any) -> Any:
    from qwenlora_serve.order import Order

    return Order(**({"prompt": "a lighthouse", "seed": 0, "steps": 1} | fields))


def pair(number: int, strength: float = 0.8) -> list[tuple[str, float]]:
    """One of the stacks, which share no file."""
    return [(f"sample-{2 * number:02}", strength), (f"sample-{2 * number + 1:02}", 1.0)]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("command", CURL_COMMANDS)
def test_the_requests_of_the_readme(server: Server, command: str) -> None:
    assert command.startswith("curl ")
    run = server.run(command, check=True, capture_output=True, text=True)
    if "picture.png" in command:
        assert run.stdout.startswith("HTTP/1.1 200")
        told = set(re.findall(r"^(qwenlora-[\w-]+): ", run.stdout, flags=re.MULTILINE))
        assert told == set(re.findall(r"`(qwenlora-[\w-]+)`", README))
        assert (server.folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert json.loads(run.stdout) == [f"sample-{number:02}" for number in range(SAMPLES)]


@pytest.mark.parametrize("loras", [[], pair(0), pair(1), [*pair(0, -0.5), *pair(1)]])
def test_pictures_are_those_of_one_process(server: Server, studio: Any, loras: Loras) -> None:
    stack = [(server.folder / "loras" / f"{name}.safetensors", own) for name, own in loras]
    report = qwenlora.compose_loras(studio.transformer, stack)
    assert report.complete
    expected = studio.paint(order(steps=2, seed=3))
    qwenlora.reset_loras(studio.transformer)
    assert (studio.paint(order(steps=2, seed=3)) == expected) is (not loras)
    assert server.painted(loras, steps=2, seed=3).body == expected
    # The same stack, named in another order.
    assert server.painted(loras[::-1], steps=2, seed=3).body == expected


def test_requests_return_to_the_replica_that_holds_their_stack(server: Server) -> None:
    stacks = [pair(number) for number in range(4)]
    # Which replica holds what is told to Ray ten times a second.
    for _ in range(100):
        held_by = [server.painted(stack) for stack in stacks]
        if all(answer.met != "new" for answer in held_by):
            break
        time.sleep(0.1)
    homes = [answer.process for answer in held_by]
    assert len(set(homes)) == 2
    for strength in (0.8, 0.5, 0.8):
        for number, home in enumerate(homes):
            answer = server.painted(pair(number, strength))
            assert (answer.process, answer.met) in [(home, "held"), (home, "in-place")]
    first, again = server.painted(pair(0)), server.painted(pair(0), prompt="a storm")
    assert (again.met, again.process) == ("in-place", first.process)
    assert first.body != again.body


def test_replicas_keep_within_their_budgets(server: Server) -> None:
    files = server.folder / "loras"
    asked: dict[int, set[str]] = defaultdict(set)
    meetings = []
    # More stacks than both replicas together may hold, twice in the same order.
    singles = [[(f"sample-{number:02}", 1.0)] for number in range(SAMPLES)]
    for stack in singles + singles:
        answer = server.painted(stack)
        meetings.append(answer.met)
        asked[answer.process].add(stack[0][0])
        assert int(answer.headers["qwenlora-kept-bytes"]) <= BUDGET
    assert any(
        sum((files / f"{name}.safetensors").stat().st_size for name in names) > BUDGET
        for names in asked.values()
    ), "the budget was never reached"
    # The one that was used least lately is the one that is dropped.
    assert meetings[SAMPLES:].count("new") >= SAMPLES - 2 * STACKS_HELD


@pytest.mark.parametrize(
    ("loras", "status", "words"),
    [
        ([("sample-00", 1.0), ("nowhere", 1.0)], 404, "no such LoRA: nowhere"),
        ([("../outside", 1.0)], 400, "'../outside' is no name"),
        ([("folder/../../outside", 1.0)], 400, "is no name"),
        ([("/etc/hostname", 1.0)], 400, "is no name"),
        ([("..\\outside", 1.0)], 400, "is no name"),
        ([("", 1.0)], 400, "is no name"),
        ([("sample-00\n", 1.0)], 400, "is no name"),
        ([("sample-00", 1.0), ("sample-00", 0.5)], 400, "named 2 times"),
        ([("sample-00", float("nan"))], 400, "finite"),
        ([("sample-00", 1.0)] * 9, 422, "at most 8"),
        ([("broken", 1.0)], 422, "broken"),
        ([("other", 1.0)], 422, "other"),
    ],
)
def test_what_cannot_be_done_is_refused(
    server: Server, loras: Loras, status: int, words: str
) -> None:
    folder = server.folder / "loras"
    shutil.copy(folder / "sample-00.safetensors", server.folder / "outside.safetensors")
    (folder / "folder").mkdir(exist_ok=True)
    (folder / "broken.safetensors").write_bytes(b"no tensors at all")
    save_file({"model.layers.0.weight": ones(2, 2)}, folder / "other.safetensors")
    answer = server.ask(loras)
    assert answer.status == status
    assert words in str(json.loads(answer.body)["detail"])


def test_a_file_that_was_replaced_is_another_lora(server: Server) -> None:
    folder = server.folder / "loras"
    shutil.copy(folder / "sample-00.safetensors", folder / "changing.safetensors")
    first = server.painted([("changing", 1.0)])
    shutil.copy(folder / "sample-01.safetensors", server.folder / "next")
    os.replace(server.folder / "next", folder / "changing.safetensors")
    assert server.painted([("changing", 1.0)]).body == server.painted([("sample-01", 1.0)]).body
    assert first.body == server.painted([("sample-00", 1.0)]).body


@pytest.mark.usefixtures("example")
# What Ray's own models do in pydantic.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_cluster_s_configuration_is_valid() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from qwenlora_serve.app import build
    from qwenlora_serve.settings import Settings

    document = ServeDeploySchema(**yaml.safe_load((EXAMPLE / "config.yaml").read_text("utf-8")))
    (application,) = document.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    build(Settings(**application.args))


def test_the_bench_measures_it(server: Server) -> None:
    found = server.folder / "found.json"
    options = f"--url http://127.0.0.1:{server.port} --json {found}"
    options += " --stacks 1 2 --clients 2 --requests 3 --rounds 2"
    bench = [sys.executable, ROOT / "benches" / "bench_serve.py", *options.split()]
    subprocess.run(bench, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads(found.read_text(encoding="utf-8"))["rows"]
    assert [row["stacks"] for row in rows] == [1, 2]
    for row in rows:
        assert row["requests"] == 6
        assert row["requests_per_s"] > 0
        assert 0 <= row["in_place"] <= row["held"] <= 1


def test_a_replica_that_dies_loses_no_request(server: Server) -> None:
    expected = server.painted(pair(2), steps=8)
    time.sleep(0.5)
    with ThreadPoolExecutor(6) as clients:
        asked = [clients.submit(server.painted, pair(2), steps=8) for _ in range(6)]
        time.sleep(0.2)
        assert not any(request.done() for request in asked)
        os.kill(expected.process, signal.SIGKILL)
        answers = [request.result() for request in asked]
    assert {answer.body for answer in answers} == {expected.body}
    assert expected.process not in {answer.process for answer in answers}
    assert max(int(answer.headers["qwenlora-attempt"]) for answer in answers) == 2


def test_stopping_leaves_no_process(server: Server) -> None:
    assert len(server.processes()) > 5
    assert server.stop() == 0
    end = time.monotonic() + 20
    while (left := server.processes()) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []
