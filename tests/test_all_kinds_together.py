"""Stacks of all kinds of adapters at once: faults, interrupts, random histories, reports, norms."""

from __future__ import annotations

import contextlib
import copy
import random

import pytest
import torch

import qwenlora
from qwenlora import ComposeOptions, LoraSet, Placement
from qwenlora.compose.planning import plan_report
from qwenlora.weight.base_weight import BaseWeight

from . import adapter_files, faults
from .adapter_files import KINDS, AdapterFile, modules_of
from .test_atomicity import _Interruption
from .test_every_kind import Layers, make_base

BLOCK = "transformer_blocks.0"
TRAINED = (
    f"{BLOCK}.attn.to_q",
    f"{BLOCK}.attn.to_k",
    f"{BLOCK}.attn.to_out.0",
    f"{BLOCK}.img_mod.1",
    f"{BLOCK}.img_mlp.net.0.proj",
    f"{BLOCK}.img_mlp.net.2",
    f"{BLOCK}.attn.norm_q",
    "img_in",
)
"""Modules of every kind of layer: few, so that a composition takes little time."""
NO_RANKS = [name for name in KINDS if name.startswith(("ia3", "oft", "boft", "diag-oft"))]
"""Kinds of which shapes tell all bytes: ranks may be fewer than shapes allow."""
PLACEMENTS = [Placement.WHOLE, Placement.BY_PATH]


@pytest.fixture(scope="module")
def base():
    return make_base()


@pytest.fixture(scope="module")
def layers(base):
    return Layers(base)


@pytest.fixture(scope="module")
def mixed(layers, tmp_path_factory):
    """A file of each kind, so that each module is trained by several; their paths."""
    folder = tmp_path_factory.mktemp("mixed")
    modules = [layers.modules[name] for name in TRAINED]
    files = adapter_files.mixed(modules * 5)
    assert {own.name for file in files for own in file.kinds.values()} == set(KINDS)
    return [(file.save(folder / str(number)), file) for number, file in enumerate(files)]


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


def at(mixed, strength):
    return [(path, strength) for path, _ in mixed]


def test_all_at_once(model, layers, mixed, probe):
    report = qwenlora.compose_loras(model, at(mixed, 0.35))
    assert report.complete
    assert report.energy_lost == 0
    layers.assert_holds(model, [(file, 0.35) for _, file in mixed])
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(probe.snapshot(layers.base)) == []


def test_their_order_is_all_the_same(model, layers, mixed):
    stack = at(mixed, 0.35)
    random.Random(0).shuffle(stack)
    qwenlora.compose_loras(model, stack)
    layers.assert_holds(model, [(file, 0.35) for _, file in mixed])


# ---- faults ----


class Fault:
    """Raises at the n-th call."""

    def __init__(self, at: int) -> None:
        self._at = at
        self.count = 0

    def pass_or_raise(self) -> None:
        self.count += 1
        if self.count == self._at + 1:
            raise KeyboardInterrupt(f"injected at call {self._at}")


@pytest.mark.slow
@pytest.mark.parametrize("from_stack", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_fault_at_every_step(placement, from_stack, model, mixed, probe):
    """An interrupt at each slot of each phase: the old state, or path by path the base."""
    base = probe.snapshot(model)
    begin = at(mixed[::2], 0.5) if from_stack else []
    at_step, happened = 0, True
    while happened:
        qwenlora.compose_loras(model, begin)
        before = probe.snapshot(model)
        fault = Fault(at_step)

        def progress(*_, fault=fault):
            fault.pass_or_raise()

        options = ComposeOptions(placement=placement, progress=progress)
        try:
            qwenlora.compose_loras(model, at(mixed, -0.7), options=options)
            happened = False
        except KeyboardInterrupt:
            wanted = before if placement is Placement.WHOLE else base
            assert probe.snapshot(model).tensors == wanted.tensors, at_step
        at_step += 1
    assert at_step > len(TRAINED)
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(base) == []


@pytest.mark.slow
@pytest.mark.parametrize("change", ["compose", "replace", "reset"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_fault_at_every_write(placement, change, model, mixed, probe, monkeypatch):
    base = probe.snapshot(model)
    begin = [] if change == "compose" else at(mixed[::2], 0.5)
    end = [] if change == "reset" else at(mixed, -0.7)
    options = ComposeOptions(placement=placement)
    at_write, happened = 0, True
    while happened:
        qwenlora.compose_loras(model, begin)
        before = probe.snapshot(model)
        with monkeypatch.context() as patch:
            fault = Fault(at_write)
            faults.replace(patch, faults.ALLOCATIONS, faults.before(fault.pass_or_raise))
            faults.replace(patch, [faults.POINTING], faults.before(fault.pass_or_raise))
            faults.replace(patch, [faults.MAKE], faults.after(fault.pass_or_raise))
            try:
                qwenlora.compose_loras(model, end, options=options)
                happened = False
            except KeyboardInterrupt:
                pass
        if happened:
            wanted = before if placement is Placement.WHOLE else base
            assert probe.snapshot(model).tensors == wanted.tensors, at_write
        at_write += 1
    assert at_write > 4
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(base) == []


@pytest.mark.slow
@pytest.mark.parametrize("change", ["compose", "replace", "reset"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_interruption_at_lines_that_write(placement, change, model, mixed, probe):
    base = probe.snapshot(model)
    begin = [] if change == "compose" else at(mixed[::2], 0.5)
    end = [] if change == "reset" else at(mixed, -0.7)
    options = ComposeOptions(placement=placement)
    line, happened = 0, True
    while happened:
        qwenlora.compose_loras(model, begin)
        before = probe.snapshot(model)
        with _Interruption(line) as interruption, contextlib.suppress(KeyboardInterrupt):
            qwenlora.compose_loras(model, end, options=options)
        happened = interruption.happened
        if happened:
            wanted = before if placement is Placement.WHOLE else base
            assert probe.snapshot(model).tensors == wanted.tensors, line
        line += 7
    assert line > 70
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(base) == []


# ---- histories ----


def bits(model):
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, t in named
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_fifty_random_operations(seed, base, mixed):
    """After each the model holds what one holds that was never touched before."""
    draw = random.Random(seed)
    model, stack = copy.deepcopy(base), []
    for _ in range(50):
        act = draw.choice(["compose", "compose", "rescale", "reset", "copy", "forget", "fail"])
        if act == "reset":
            qwenlora.reset_loras(model)
            stack = []
        elif act == "copy":
            model = copy.deepcopy(model)
        elif act == "forget":
            qwenlora.clear_cache()
        else:
            if act == "rescale":
                wanted = [(path, draw.uniform(-1, 1)) for path, _ in stack]
            else:
                some = draw.sample(mixed, draw.choice([1, 2, 3, 6]))
                wanted = [(path, draw.choice([1.0, 0.35, -0.7])) for path, _ in some]
            stack = brought(model, stack, wanted, draw, fails=act == "fail")
        fresh = copy.deepcopy(base)
        qwenlora.compose_loras(fresh, stack)
        found, expected = bits(model), bits(fresh)
        assert found.keys() == expected.keys(), act
        assert [name for name in found if found[name] != expected[name]] == [], act
    qwenlora.reset_loras(model)
    assert bits(model) == bits(base)


def brought(model, before, wanted, draw, *, fails: bool):
    """Compose, perhaps with an error at some step; the stack that is in place then."""
    fault = Fault(draw.randrange(12) if fails else -1)
    placement = draw.choice(list(Placement))
    options = ComposeOptions(placement=placement, progress=lambda *_: fault.pass_or_raise())
    try:
        qwenlora.compose_loras(model, wanted, options=options)
    except KeyboardInterrupt:
        return [] if qwenlora.applied(model).failure else before
    return wanted


# ---- reports and work ----


def size(model) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_what_was_planned(name, base, layers, tmp_path):
    modules = [layers.modules[own] for own in TRAINED]
    file = AdapterFile.of(name, modules)
    path = file.save(tmp_path / "file")
    model = copy.deepcopy(base)
    planned = plan_report(model, LoraSet.of(path))
    report = qwenlora.compose_loras(model, path)
    assert report.complete
    assert report.added_bytes == size(model) - size(base)
    assert report.added_bytes <= planned.added_bytes
    if name in NO_RANKS:
        assert report.added_bytes == planned.added_bytes
    assert qwenlora.applied(model) is report
    assert qwenlora.compose_loras(model, path) is report


@pytest.fixture
def norms_made(monkeypatch):
    """How often norms of a weight were computed."""
    made = []
    for name in ("_row_norms", "_column_norms"):
        compute = getattr(BaseWeight, name)

        def counted(self, *args, compute=compute):
            made.append(self.path)
            return compute(self, *args)

        monkeypatch.setattr(BaseWeight, name, counted)
    return made


def test_another_strength_reads_nothing_and_makes_no_norm(model, layers, mixed, reads, norms_made):
    # A value that is replaced moves, after which it is read once more.
    mixed = [(path, file) for path, file in mixed if not file.replaces]
    qwenlora.compose_loras(model, at(mixed, 1.0))
    assert norms_made
    before = (reads.tensors, len(norms_made))
    qwenlora.compose_loras(model, at(mixed, 0.35))
    assert (reads.tensors, len(norms_made)) == before
    layers.assert_holds(model, [(file, 0.35) for _, file in mixed])


def test_the_same_stack_is_no_work(model, mixed, probe, reads):
    report = qwenlora.compose_loras(model, at(mixed, 0.35))
    before = probe.addresses(model)
    plans = reads.plans
    assert qwenlora.compose_loras(model, at(mixed, 0.35)) is report
    assert (probe.addresses(model), reads.plans) == (before, plans)


def test_weights_that_are_loaded_anew_are_noticed(model, mixed, norms_made):
    """What was made of the old weights is not used for the new ones."""
    qwenlora.compose_loras(model, at(mixed, 1.0))
    qwenlora.reset_loras(model)
    count = len(norms_made)
    other = make_base()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dtype is torch.float32 and parameter.ndim == 2:
                parameter.mul_(1.5)
    model.load_state_dict(other.state_dict())
    qwenlora.compose_loras(model, at(mixed, 1.0))
    assert len(norms_made) > count
    qwenlora.compose_loras(other, at(mixed, 1.0))
    assert bits(model) == bits(other)


def test_the_table_of_an_embedding_is_replaced(model, tmp_path, probe):
    """Layered Qwen-Image has one."""
    model.time_text_embed.addition_t_embedding = torch.nn.Embedding(2, 256)
    model.requires_grad_(False)
    modules = modules_of(model)
    name = "time_text_embed.addition_t_embedding"
    base, before = probe.snapshot(model), modules[name].weight
    file = AdapterFile.of("set_weight", [modules[name]])
    report = qwenlora.compose_loras(model, (file.save(tmp_path / "file"), -0.7))
    assert report.complete
    found = model.time_text_embed.addition_t_embedding.weight.double()
    expected = before - 0.7 * (file.merged[name].weight - before)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(base) == []
