"""What the tests share: tiny emulated models, LoRA files in the making, and a view into a model."""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import gc
import importlib
import os
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

import qwenlora
import qwenlora.runtime
from qwenlora import _core
from qwenlora.compose import bring
from qwenlora.emulation import EmulatedConfig, Precision, random_transformer
from qwenlora.emulation.delay import LazyWorkers, SleepyWorkers
from qwenlora.packing import pack
from qwenlora.packing.layout import LowRankSide
from qwenlora.sizes import sized
from qwenlora.slots.branch import BRANCH_DOWN, BRANCH_UP
from qwenlora.work.workers import RustWorkers, employ

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WIDTH = 128
TEXT_WIDTH = 96
IMAGE_CHANNELS = 64
HIDDEN = 4 * WIDTH
PLANES = 6

_SLOW_INPUTS = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "fast", max_examples=12, deadline=None, suppress_health_check=_SLOW_INPUTS
)
settings.register_profile(
    "slow", max_examples=200, deadline=None, suppress_health_check=_SLOW_INPUTS
)


def pytest_configure(config: pytest.Config) -> None:
    # The tensors are tiny and the machines shared: more threads only wait for each other.
    torch.set_num_threads(1)
    if config.getoption("--hypothesis-profile", default=None) is None:
        settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


HOST = "host"
"""The fixture that starts a ComfyUI, which takes seconds."""

TOGETHER = (
    "tests/browser/",
    "tests/host/test_compiled.py",
    "tests/host/test_native",
    "tests/host/",
    "tests/release/test_pack_in_comfyui.py",
    "tests/test_benches.py",
    "tests/test_demo.py",
    "tests/test_merge_base_z_image.py",
    "tests/test_oracles.py",
    "tests/test_serve.py",
    "tests/test_z_image_emulation.py",
)
"""How the names of tests begin that share what takes seconds to make; the first counts.

Those with a ComfyUI are three groups: in one, they would keep a process busy when all others are
done. A process that gets two of them starts it once.
"""


OLD_TORCH = not hasattr(torch, "accelerator")
"""PyTorch 2.5: today's diffusers, peft and lycoris cannot be imported beside it."""
WITH_TOOLS = (
    "test_adapter_tools",
    "test_demo",
    "test_emulation",
    "test_gpu_z_image",
    "test_lite",
    "test_lycoris",
    "test_merge",
    "test_methods_of_others",
    "test_non_finite",
    "test_opened_attention",
    "test_oracles",
    "test_peft",
    "test_pipeline",
    "test_scripting",
    "test_serving",
    "test_trained",
    "test_two_spellings",
    "test_z_image",
)
"""How the names of test files begin that import one of them."""
collect_ignore_glob = [f"{name}*.py" for name in WITH_TOOLS] if OLD_TORCH else []


def pytest_report_header() -> str:
    left_out = "; tests with diffusers, peft and lycoris are left out" if OLD_TORCH else ""
    return f"torch {torch.__version__}{left_out}"


@pytest.fixture(scope="session")
def diffusers():
    """Diffusers, for tests of files that mostly do without."""
    if OLD_TORCH:
        pytest.skip("today's diffusers needs a newer PyTorch")
    return importlib.import_module("diffusers")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object):
    """Tests go to the next free process one by one, and those of `TOGETHER` to the same."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((name for name in TOGETHER if nodeid.startswith(name)), nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = _without_those_that_take_turns(items)
    for item in items:
        if HOST in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):
        # A long test that came last would leave the other processes without work.
        items.sort(key=lambda item: "slow" not in item.keywords)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    # What is imported stays. Each collection of cycles would go through half a million objects.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    # nanobind complains of what is still there when the process ends.
    gc.unfreeze()


# ---- threads beside a composition ----

WORKERS = {
    "rust": RustWorkers,
    "lazy": LazyWorkers,
    "sleepy": lambda: SleepyWorkers(seed=0),
}
DELAYED = {"test_atomicity", "test_kept", "test_offload", "test_paths", "test_refusals"}
"""Modules whose tests run with slow threads, too: none may read what is not there yet."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # A test that asks for `workers` says itself which it meets.
    is_delayed = metafunc.module.__name__.rpartition(".")[2] in DELAYED
    if is_delayed and "workers" not in metafunc.fixturenames:
        metafunc.fixturenames.append("workers")
        kinds = [_kind(name) for name in WORKERS]
        metafunc.parametrize("workers", kinds, indirect=True)


def _kind(name: str):
    """A value of `workers`; while a developer waits, the real threads are enough."""
    return pytest.param(name, marks=() if name == "rust" else pytest.mark.slow)


def _without_those_that_take_turns(items: list[pytest.Item]) -> list[pytest.Item]:
    """What a marker `in_turn(NAME, ...)` leaves.

    Parameters of these names take turns with the kinds of threads. Each combination of all
    parameters meets a kind, and each combination of the other ones meets every kind.
    """
    numbers: dict[tuple[object, ...], int] = {}
    counts: Counter[tuple[object, ...]] = Counter()

    def number_of(*key: object) -> int:
        """Counts what differs in the last part alone."""
        if key not in numbers:
            numbers[key] = counts[key[:-1]]
            counts[key[:-1]] += 1
        return numbers[key]

    rows = []
    for item in items:
        mark = item.get_closest_marker("in_turn")
        if mark is None:
            continue
        own = {name: repr(value) for name, value in item.callspec.params.items()}
        kind = list(map(repr, WORKERS)).index(own.pop("workers"))
        turns = tuple(own.pop(name) for name in mark.args)
        turn = number_of(function := item.nodeid.partition("[")[0], "turn", turns)
        rest = number_of(function, "rest", tuple(own.items()))
        rows.append((item, function, kind - turn - rest))
    dropped = {
        item
        for item, function, distance in rows
        if distance % min(counts[function, "turn"], len(WORKERS))
    }
    return [item for item in items if item not in dropped]


@pytest.fixture
def workers(request):
    with employ(WORKERS[request.param]()):
        yield


@pytest.fixture
def rescalings(monkeypatch):
    """How many compositions were changes of strengths in place."""
    done = []
    prepare = bring.prepare_rescaling

    def prepared(*args):
        found = prepare(*args)
        if found is not None:
            done.append(found)
        return found

    monkeypatch.setattr(bring, "prepare_rescaling", prepared)
    return done


# ---- LoRA files ----


class KeyStyle(enum.Enum):
    """How a trainer spells a module's tensors."""

    DIFFUSERS = "diffusers"
    KOHYA = "kohya"

    def stem(self, target: str) -> str:
        if self is KeyStyle.DIFFUSERS:
            return f"transformer.{target}"
        return f"lora_unet_{target.replace('.', '_')}"

    def key(self, target: str, role: str) -> str:
        names = {
            KeyStyle.DIFFUSERS: {"down": "lora_A.weight", "up": "lora_B.weight"},
            KeyStyle.KOHYA: {"down": "lora_down.weight", "up": "lora_up.weight"},
        }
        return f"{self.stem(target)}.{names[self].get(role, role)}"


_BLOCK_SIZES = {
    "attn.to_qkv": (WIDTH, 3 * WIDTH),
    "img_mod.1": (WIDTH, PLANES * WIDTH),
    "txt_mod.1": (WIDTH, PLANES * WIDTH),
    "img_mlp.net.0.proj": (WIDTH, HIDDEN),
    "txt_mlp.net.0.proj": (WIDTH, HIDDEN),
    "img_mlp.net.2": (HIDDEN, WIDTH),
    "txt_mlp.net.2": (HIDDEN, WIDTH),
}
_TOP_SIZES = {
    "img_in": (IMAGE_CHANNELS, WIDTH),
    "txt_in": (TEXT_WIDTH, WIDTH),
    "time_text_embed.timestep_embedder.linear_1": (256, WIDTH),
    "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
    "norm_out.linear": (WIDTH, 2 * WIDTH),
    "proj_out": (WIDTH, 64),
}
_FUSED = {
    "attn.to_q": ("attn.to_qkv", 0),
    "attn.to_k": ("attn.to_qkv", 1),
    "attn.to_v": ("attn.to_qkv", 2),
    "attn.add_q_proj": ("attn.add_qkv_proj", 0),
    "attn.add_k_proj": ("attn.add_qkv_proj", 1),
    "attn.add_v_proj": ("attn.add_qkv_proj", 2),
}
BLOCK_TARGETS = (*_FUSED, "attn.to_out.0", "attn.to_add_out", *list(_BLOCK_SIZES)[1:])
TOP_TARGETS = tuple(_TOP_SIZES)


def _in_block(target: str) -> tuple[str, str]:
    """Cut `transformer_blocks.N.` off; empty for a top-level target."""
    if not target.startswith("transformer_blocks."):
        return "", target
    parts = target.split(".", 2)
    return f"{parts[0]}.{parts[1]}.", parts[2]


def sizes_of(target: str) -> tuple[int, int]:
    """(in, out) of a module of the tiny models."""
    block, name = _in_block(target)
    return _BLOCK_SIZES.get(name, (WIDTH, WIDTH)) if block else _TOP_SIZES[name]


def slot_of_target(target: str) -> tuple[str, int, int]:
    """(slot's path, first row, rows) that a target's delta is added to."""
    block, name = _in_block(target)
    slot, part = _FUSED.get(name, (name, 0))
    rows = sizes_of(target)[1]
    return f"{block}{slot}", part * rows, rows


class LoraDraft:
    """A LoRA in the making: tensors under a trainer's keys, and the deltas they stand for."""

    def __init__(
        self,
        seed: int = 0,
        *,
        style: KeyStyle = KeyStyle.DIFFUSERS,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.deltas: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._style = style
        self._dtype = dtype

    @classmethod
    def full(cls, seed: int = 0, rank: int = 4, *, blocks: int = 1, **options) -> LoraDraft:
        """Every linear of the first blocks and of the top level."""
        draft = cls(seed, **options)
        for block in range(blocks):
            for name in BLOCK_TARGETS:
                draft.add(f"transformer_blocks.{block}.{name}", rank)
        for name in TOP_TARGETS:
            draft.add(name, rank)
        return draft

    def key(self, target: str, role: str) -> str:
        """The key of a module's tensor, e.g. `role` "down", "alpha", "diff_b"."""
        return self._style.key(target, role)

    def random(self, *shape: int) -> torch.Tensor:
        """Values of the size that training leaves, in the file's dtype."""
        return (0.1 * torch.randn(shape, generator=self._generator)).to(self._dtype)

    def add(
        self,
        target: str,
        rank: int,
        *,
        alpha: float | None = None,
        down: torch.Tensor | None = None,
        up: torch.Tensor | None = None,
    ) -> LoraDraft:
        """Add a plain pair; without alpha the scale is 1."""
        inputs, outputs = sizes_of(target)
        down = self.random(rank, inputs) if down is None else down
        up = self.random(outputs, rank) if up is None else up
        self.tensors[self.key(target, "down")] = down
        self.tensors[self.key(target, "up")] = up
        if alpha is not None:
            self.tensors[self.key(target, "alpha")] = torch.tensor(alpha, dtype=torch.float32)
        scale = 1.0 if alpha is None else alpha / rank
        self.deltas[target] = scale * (up.double() @ down.double())
        return self

    def put(self, target: str, role: str, *shape: int) -> LoraDraft:
        """Add another tensor of a module."""
        self.tensors[self.key(target, role)] = self.random(*shape)
        return self

    def slot_delta(self, slot: str, shape: tuple[int, int]) -> torch.Tensor:
        """The (out, in) float64 delta of one slot, rows in the file's order."""
        delta = torch.zeros(shape, dtype=torch.float64)
        for target, part in self.deltas.items():
            path, begin, rows = slot_of_target(target)
            if path == slot:
                delta[begin : begin + rows] += part
        return delta

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> Path:
        """Write a safetensors file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.contiguous().clone() for key, tensor in self.tensors.items()}
        save_file(tensors, str(path), metadata=metadata)
        return path


# ---- models ----


def make_model(
    *,
    num_layers: int = 1,
    rank: int = 32,
    dtype: torch.dtype = torch.float32,
    precision: Precision = Precision.EXACT,
    seed: int = 0,
):
    """A tiny emulated transformer; in float32 it computes exactly what its weights say.

    Of each kind one is made, and copies of it are given away.
    """
    config = EmulatedConfig(
        num_layers=num_layers,
        heads=2,
        head_dim=WIDTH // 2,
        axes_dims_rope=(16, 24, 24),
        joint_attention_dim=TEXT_WIDTH,
        rank=rank,
        precision=precision,
        dtype=dtype,
    )
    return copy.deepcopy(_made(config, seed))


@functools.cache
def _made(config: EmulatedConfig, seed: int):
    return random_transformer(config, seed=seed)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that composing may change, copied.

    Attributes:
        tensors: Bytes, dtype and shape of every parameter and buffer.
        structure: Module tree, attributes, buffers and hooks, module by module.
    """

    tensors: dict[str, tuple[torch.dtype, torch.Size, bytes]]
    structure: dict[str, tuple[object, ...]]

    def differences(self, other: Snapshot) -> list[str]:
        """Names of what differs."""
        found = []
        for mine, its in ((self.tensors, other.tensors), (self.structure, other.structure)):
            found += [name for name in {**mine, **its} if mine.get(name) != its.get(name)]
        return found


class ModelProbe:
    """Looks into a model without the engine's help."""

    @staticmethod
    def tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        yield from model.named_parameters()
        yield from model.named_buffers()

    def values(self, model: torch.nn.Module) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
        """Copy what a comparison of tensors needs."""
        tensors = {}
        for name, tensor in self.tensors(model):
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            tensors[name] = (tensor.dtype, tensor.shape, flat.cpu().numpy().tobytes())
        return tensors

    def snapshot(self, model: torch.nn.Module) -> Snapshot:
        """Copy what a comparison needs."""
        tensors = self.values(model)
        structure = {f"{path}:": _structure(module) for path, module in model.named_modules()}
        structure["state_dict:"] = tuple(model.state_dict())
        return Snapshot(tensors, structure)

    def addresses(self, model: torch.nn.Module) -> dict[str, int]:
        """Where every tensor lies."""
        return {name: tensor.data_ptr() for name, tensor in self.tensors(model)}

    def delta(self, model, path: str) -> torch.Tensor:
        """The dense (out, in) float64 delta in a slot, rows in a file's order."""
        module = model.get_submodule(path)
        if hasattr(module, "proj_down"):
            base = model.config.rank
            down = pack.unpack_lowrank(module.proj_down.detach(), LowRankSide.DOWN)[base:]
            up = pack.unpack_lowrank(module.proj_up.detach(), LowRankSide.UP)[:, base:]
            return up.double() @ down.double()
        down, up = (getattr(module, name, None) for name in (BRANCH_DOWN, BRANCH_UP))
        if down is None or up is None:
            return torch.zeros(1, dtype=torch.float64)
        delta = up.double() @ down.double()
        if getattr(module, "qweight", None) is None:
            return delta
        return pack.deinterleave_modulation(delta.float()).double()

    def assert_holds(self, model, stack: list[tuple[LoraDraft, float]], *, within: float) -> None:
        """Every slot holds exactly the sum of the drafts' deltas, relative to its norm."""
        slots = {slot_of_target(target)[0] for draft, _ in stack for target in draft.deltas}
        assert slots
        for slot in slots:
            measured = self.delta(model, slot)
            shape = tuple(measured.shape)
            wanted = sum(strength * draft.slot_delta(slot, shape) for draft, strength in stack)
            error = float((measured - wanted).norm() / wanted.norm())
            assert error <= within, f"{slot}: relative error {error:.2e}"

    def output(self, model, *, call=None, **options) -> torch.Tensor:
        """The model's answer to one fixed input, through `call` where it is given."""
        generator = torch.Generator().manual_seed(1)
        dtype = model.dtype
        with torch.no_grad():
            return (call or model)(
                hidden_states=torch.randn(2, 12, IMAGE_CHANNELS, generator=generator).to(dtype),
                encoder_hidden_states=torch.randn(2, 5, TEXT_WIDTH, generator=generator).to(dtype),
                timestep=torch.tensor([0.7, 0.3]),
                img_shapes=[[(1, 3, 4)]] * 2,
                **options,
            ).sample


def _structure(module: torch.nn.Module) -> tuple[object, ...]:
    hooks = [
        tuple(getattr(module, name).values())
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    return (
        type(module),
        # What is remembered of a model that was looked at is no part of it.
        tuple(name for name in module.__dict__ if name != "_qwenlora_structure"),
        tuple(module._modules),
        tuple((name, p is None or p.requires_grad) for name, p in module._parameters.items()),
        tuple(module._buffers),
        frozenset(module._non_persistent_buffers_set),
        tuple(hooks),
        len(module._forward_hooks_with_kwargs),
        len(module._forward_hooks_always_called),
    )


# ---- fixtures ----


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    """No test sees what another left in the process-wide caches."""
    qwenlora.clear_cache()
    yield
    qwenlora.clear_cache()


@pytest.fixture(scope="session", name="make_model")
def _make_model():
    """The factory `make_model`."""
    return make_model


@pytest.fixture(scope="session", name="Draft")
def _draft() -> type[LoraDraft]:
    """The class `LoraDraft`."""
    return LoraDraft


@pytest.fixture(scope="session")
def kohya() -> KeyStyle:
    """The other key style."""
    return KeyStyle.KOHYA


@pytest.fixture(scope="session")
def probe() -> ModelProbe:
    """The view into a model."""
    return ModelProbe()


@pytest.fixture
def model():
    """A tiny model of one block, never touched."""
    return make_model()


@pytest.fixture
def lora(tmp_path: Path) -> tuple[Path, LoraDraft]:
    """A file that trains every linear of the tiny model, and what it stands for."""
    draft = LoraDraft.full(seed=1, rank=4)
    return draft.save(tmp_path / "full.safetensors"), draft


@pytest.fixture
def resize():
    """Puts other sizes in force until the test ends."""
    with contextlib.ExitStack() as until:
        yield lambda **fields: until.enter_context(sized(**fields))


class Reads:
    """Counts what is read of files: plans and tensors."""

    def __init__(self) -> None:
        self.plans = 0
        self.tensors = 0
        self.open = 0


@pytest.fixture
def reads(monkeypatch):
    counted = Reads()
    plan, reader, readers = _core.FilePlan, _core.TensorReader, _core.Readers
    lock = threading.Lock()

    class CountingPlan:
        from_tensors = plan.from_tensors

        @staticmethod
        def read(path):
            counted.plans += 1
            return plan.read(path)

    class CountingReader:
        def __init__(self, path):
            self._reader = reader(path)
            self._closed = False
            counted.open += 1

        def __getattr__(self, name):
            return getattr(self._reader, name)

        def read_into(self, ranges, dest, *, threads):
            with lock:
                counted.tensors += len(ranges)
            return self._reader.read_into(ranges, dest, threads=threads)

        def close(self):
            counted.open -= not self._closed
            self._closed = True
            self._reader.close()

    class CountingReaders:
        def __init__(self, *, threads):
            self._readers = readers(threads=threads)

        def read(self, file, runs, dest, *, measure):
            with lock:
                counted.tensors += sum(len(offsets) for offsets, *_ in runs)
            return self._readers.read(file._reader, runs, dest, measure=measure)

        def close(self):
            self._readers.close()

    monkeypatch.setattr(_core, "FilePlan", CountingPlan)
    monkeypatch.setattr(_core, "TensorReader", CountingReader)
    monkeypatch.setattr(_core, "Readers", CountingReaders)
    return counted


@pytest.fixture
def composed(monkeypatch):
    """Sets that the runtime composed, in order."""
    seen = []
    bring = qwenlora.runtime.bring

    def counting(module, wanted, **options):
        seen.append(wanted)
        return bring(module, wanted, **options)

    monkeypatch.setattr("qwenlora.runtime.bring", counting)
    return seen
