"""Faults at every slot, in every phase: the model ends in a whole state, bit for bit."""

from __future__ import annotations

import gc
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import qwenlora
from qwenlora import ComposeOptions, Placement
from qwenlora.errors import ModelStateError, NonFiniteError
from qwenlora.group.arena import BranchArena
from qwenlora.group.host_arena import HostPackedArena
from qwenlora.model import subclass
from qwenlora.model.state import read_state
from qwenlora.model.target import factors_of
from qwenlora.packing.layout import LowRankSide
from qwenlora.plan.documents import SlotKind
from qwenlora.slots import branch, opened, packed, point, value, whole
from qwenlora.slots.find import find_targets
from qwenlora.slots.packed import PackedSlot

from . import faults

FAULTS = [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt]
PHASES = ["stage", "write"]


class Fault:
    """Raises at the n-th of the calls it is asked about; `count` calls were made so far."""

    def __init__(self, error: type[BaseException], at: int, *, lasting: bool = False) -> None:
        self._error = error
        self._at = at
        self._lasting = lasting
        self.count = 0

    def pass_or_raise(self) -> None:
        at = self.count
        self.count += 1
        if at == self._at or (self._lasting and at > self._at):
            raise self._error(f"injected at call {at}")


@pytest.fixture
def stacks(Draft, tmp_path):
    """The previous stack and the wanted one; slots of each lie outside the other."""
    previous = Draft.full(seed=1, rank=20)
    wanted = Draft.full(seed=2, rank=4)
    for draft, target in ((previous, "img_in"), (wanted, "transformer_blocks.0.attn.to_out.0")):
        for role in ("down", "up"):
            del draft.tensors[draft.key(target, role)]
    return (
        previous.save(tmp_path / "previous.safetensors"),
        [(wanted.save(tmp_path / "wanted.safetensors"), 0.5)],
    )


class Scene:
    """A model before a composition that will fail, and what it must end in."""

    def __init__(self, make_model, probe, stacks, *, from_stack: bool) -> None:
        self.model = make_model()
        self.probe = probe
        self.wanted = stacks[1]
        self.base = probe.snapshot(self.model)
        fresh = make_model()
        qwenlora.compose_loras(fresh, self.wanted)
        self.fresh = probe.snapshot(fresh)
        if from_stack:
            qwenlora.compose_loras(self.model, stacks[0])
        self.before = probe.snapshot(self.model)
        self.report = qwenlora.applied(self.model)

    def fail(self, placement, error, progress=None) -> None:
        options = ComposeOptions(placement=placement, progress=progress)
        with pytest.raises(error, match="injected"):
            qwenlora.compose_loras(self.model, self.wanted, options=options)

    def check_and_restart(self, placement, error, previous) -> None:
        """Check what the fault left; bring the model back to where the scene began."""
        if placement is Placement.WHOLE:
            assert self.probe.snapshot(self.model).differences(self.before) == []
            assert qwenlora.applied(self.model) is self.report
            return
        self.check_base(error)
        self.restart(previous)

    def restart(self, previous) -> None:
        self.report = qwenlora.compose_loras(self.model, previous)
        assert self.probe.snapshot(self.model).differences(self.before) == []

    def check_base(self, error) -> None:
        assert self.probe.snapshot(self.model).tensors == self.base.tensors
        report = qwenlora.applied(self.model)
        assert report.failure.startswith(f"{error.__name__}: injected")
        assert not report.complete
        assert report.slots == ()
        assert "composing failed" in report.summary()
        hooked = [m for m in self.model.modules() if m._forward_hooks]
        assert hooked == []

    def check_next(self) -> None:
        """The next composition works, and its outcome owes nothing to the fault."""
        report = qwenlora.compose_loras(self.model, self.wanted)
        assert report.failure is None
        assert self.probe.snapshot(self.model).differences(self.fresh) == []
        qwenlora.reset_loras(self.model)
        assert self.probe.snapshot(self.model).differences(self.base) == []


@pytest.fixture(params=[False, True], ids=["from base", "from a stack"])
def scene(request, make_model, probe, stacks):
    return Scene(make_model, probe, stacks, from_stack=request.param)


@pytest.fixture
def previous(scene, stacks):
    return stacks[0] if scene.report.loras else []


@pytest.mark.slow
@pytest.mark.in_turn("error", "scene")
@pytest.mark.parametrize("placement", [Placement.WHOLE, Placement.BY_PATH])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("error", FAULTS)
def test_a_fault_at_every_slot(placement, phase, error, scene, previous):
    total = len(qwenlora.compose_loras(scene.model, scene.wanted).slots) + 1
    scene.restart(previous)
    hit = 0
    for slot in range(total):
        fault = Fault(error, slot)

        def progress(told, done, count, fault=fault):
            assert 0 <= done < count
            if told == phase:
                fault.pass_or_raise()

        try:
            scene.fail(placement, error, progress)
        except pytest.fail.Exception:
            # Past the last slot there is nothing left to fail.
            assert slot >= total - 1
            break
        hit += 1
        scene.check_and_restart(placement, error, previous)
    assert hit >= total - 1
    scene.check_next()


@contextmanager
def _failing_allocation(monkeypatch, fault: Fault):
    with monkeypatch.context() as patch:
        faults.replace(patch, faults.ALLOCATIONS, faults.before(fault.pass_or_raise))
        yield


@pytest.mark.slow
@pytest.mark.in_turn("error", "scene")
@pytest.mark.parametrize("placement", [Placement.WHOLE, Placement.BY_PATH])
@pytest.mark.parametrize("error", FAULTS)
def test_a_fault_at_every_allocation(placement, error, scene, previous, monkeypatch):
    counter = Fault(error, -1)
    with _failing_allocation(monkeypatch, counter):
        qwenlora.compose_loras(scene.model, scene.wanted)
    assert counter.count > 20
    scene.restart(previous)
    for call in range(counter.count):
        with _failing_allocation(monkeypatch, Fault(error, call)):
            scene.fail(placement, error)
        scene.check_and_restart(placement, error, previous)
    scene.check_next()


@pytest.mark.slow
@pytest.mark.parametrize("call", [0, 1, 3, 8, 17, 20])
def test_a_device_that_stays_full(call, scene, previous, monkeypatch):
    # Restoring allocates, too: with no memory at all the base still comes back.
    fault = Fault(torch.OutOfMemoryError, call, lasting=True)
    with _failing_allocation(monkeypatch, fault):
        scene.fail(Placement.BY_PATH, torch.OutOfMemoryError)
    scene.check_base(torch.OutOfMemoryError)
    scene.check_next()


def test_restoring_through_the_host_is_exact(model, lora, probe, monkeypatch):
    base = probe.snapshot(model)
    qwenlora.compose_loras(model, lora[0])
    fault = Fault(torch.OutOfMemoryError, 0, lasting=True)
    restored = 0
    with _failing_allocation(monkeypatch, fault):
        for target in find_targets(model, read_state(model).base_ranks).values():
            slot = whole.slot_of(target)
            restored += any(isinstance(part, PackedSlot) for part in slot._parts)
            for part in slot._parts:
                part.restore()
    assert fault.count == restored == 8
    assert probe.snapshot(model).tensors == base.tensors


def test_a_base_that_fits_on_no_device_is_not_lost(model, lora, monkeypatch):
    packed = [t for t in find_targets(model, {}).values() if t.kind is SlotKind.SVDQ]
    base = [factors_of(packed, side) for side in LowRankSide]
    base = [[factor.detach().clone() for factor in own] for own in base]
    qwenlora.compose_loras(model, lora[0])

    def full(tensor, *args):
        raise torch.OutOfMemoryError("injected")

    with (
        _failing_allocation(monkeypatch, Fault(torch.OutOfMemoryError, 0, lasting=True)),
        monkeypatch.context() as patch,
    ):
        patch.setattr(torch.Tensor, "to", full)
        for target in packed:
            with pytest.raises(torch.OutOfMemoryError):
                PackedSlot(target).restore()
    # When there is room again.
    for target in packed:
        PackedSlot(target).restore()
    for side, own in zip(LowRankSide, base, strict=True):
        found = factors_of(packed, side)
        assert all(map(torch.equal, found, own))


@pytest.mark.parametrize("fault", ["while writing", "in the data"])
def test_going_back_holds_no_memory_of_parts_that_are_in_place(
    fault, make_model, Draft, tmp_path, monkeypatch
):
    """Path by path is how memory is saved: each slot that goes back lets go of what it held."""
    alive = []

    def count():
        gc.collect()
        alive.append(sum(type(o) in (HostPackedArena, BranchArena) for o in gc.get_objects()))

    faults.replace(monkeypatch, [faults.TO_BASE], faults.before(count))
    model, draft = make_model(), Draft.full(seed=1)
    total = len(qwenlora.compose_loras(model, draft.tensors).slots)
    qwenlora.reset_loras(model)
    raising = Fault(RuntimeError, total - 1)

    def progress(phase, done, total):
        if phase == "write" and fault == "while writing":
            raising.pass_or_raise()

    if fault == "in the data":
        draft.tensors[draft.key("transformer_blocks.0.attn.to_q", "down")][0, 0] = float("nan")
    path = draft.save(tmp_path / "lora.safetensors")
    options = ComposeOptions(placement=Placement.BY_PATH, progress=progress)
    with pytest.raises(RuntimeError if fault == "while writing" else NonFiniteError):
        qwenlora.compose_loras(model, path, options=options)
    # The part that was being placed when the error came may be held by its frames.
    assert len(alive) == 1
    assert alive[0] <= 1


@pytest.mark.parametrize("placement", [Placement.WHOLE, Placement.BY_PATH])
def test_a_fault_while_resetting(placement, make_model, probe, stacks, monkeypatch):
    model = make_model()
    base = probe.snapshot(model)
    # A base that is kept would only have to be pointed at.
    options = ComposeOptions(placement=placement, cache_bytes=0)
    report = qwenlora.compose_loras(model, stacks[0], options=options)
    composed = probe.snapshot(model)
    for call in range(0, 20, 3):
        with (
            _failing_allocation(monkeypatch, Fault(KeyboardInterrupt, call)),
            pytest.raises(KeyboardInterrupt),
        ):
            qwenlora.compose_loras(model, [], options=options)
        if placement is Placement.WHOLE:
            assert probe.snapshot(model).differences(composed) == []
            assert qwenlora.applied(model) is report
        else:
            assert probe.snapshot(model).tensors == base.tensors
            assert qwenlora.applied(model).failure is not None
            qwenlora.compose_loras(model, stacks[0], options=options)
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(base) == []


# ---- interrupted in the middle of one slot ----

_WRITERS = {
    code.__code__
    for code in (
        packed.PackedChange.make,
        branch.BranchChange.make,
        value._ValueChange.make,
        value._ValueChange._record,
        point.point,
        point.point_all,
        branch.set_branch,
        branch._remove_hook,
        opened.set_as_needed,
        subclass.mark_hooked,
        subclass.unmark_hooked,
    )
}


class _Interruption:
    """Raises KeyboardInterrupt once, at the n-th line that the writing functions run."""

    def __init__(self, at: int) -> None:
        self._left = at
        self.happened = False

    def __enter__(self):
        self._kept = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self._kept)

    def _call(self, frame, _event, _arg):
        return self._line if frame.f_code in _WRITERS and not self.happened else None

    def _line(self, _frame, event, _arg):
        if event == "line" and not self.happened:
            if self._left == 0:
                self.happened = True
                raise KeyboardInterrupt("injected")
            self._left -= 1
        return self._line


@pytest.mark.slow
@pytest.mark.in_turn("placement")
@pytest.mark.parametrize("placement", [Placement.WHOLE, Placement.BY_PATH])
@pytest.mark.parametrize("change", ["compose", "replace", "reset"])
def test_an_interruption_at_every_line_that_writes(placement, change, make_model, probe, Draft):
    targets = ("img_in", "transformer_blocks.0.attn.to_out.0", "proj_out")
    first, second = (Draft(seed) for seed in (1, 2))
    for target in targets:
        first.add(target, 4)
        second.add(target, 20)
    begin = [] if change == "compose" else first.tensors
    end = [] if change == "reset" else second.tensors
    model = make_model()
    base = probe.snapshot(model)
    qwenlora.compose_loras(model, begin)
    before = probe.snapshot(model)
    options = ComposeOptions(placement=placement)
    line = 0
    while True:
        with _Interruption(line) as interruption:
            try:
                qwenlora.compose_loras(model, end, options=options)
            except KeyboardInterrupt:
                assert interruption.happened
        if not interruption.happened:
            break
        if placement is Placement.WHOLE:
            assert _essence(probe.snapshot(model)) == _essence(before), f"line {line}"
        else:
            assert probe.snapshot(model).tensors == base.tensors, f"line {line}"
            assert not any(module._forward_hooks for module in model.modules()), f"line {line}"
            qwenlora.compose_loras(model, begin)
        line += 1
    assert line > 8
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).tensors == base.tensors


def _essence(snapshot):
    """Tensors and hooks: a buffer put back may come back in another order of attributes."""
    return snapshot.tensors, {path: row[6] for path, row in snapshot.structure.items() if row}


@pytest.mark.parametrize("placement", [Placement.WHOLE, Placement.BY_PATH])
@pytest.mark.parametrize("change", ["compose", "replace", "reset"])
def test_an_error_between_the_two_halves_of_a_slot(
    placement, change, make_model, probe, stacks, monkeypatch
):
    model = make_model()
    base = probe.snapshot(model)
    if change != "compose":
        qwenlora.compose_loras(model, stacks[0])
    before = probe.snapshot(model)

    fault = Fault(RuntimeError, 1)
    with monkeypatch.context() as patch:
        faults.replace(patch, [faults.POINTING], faults.before(fault.pass_or_raise))
        with pytest.raises(RuntimeError, match="injected"):
            qwenlora.compose_loras(
                model,
                [] if change == "reset" else stacks[1],
                options=ComposeOptions(placement=placement),
            )
    wanted = before if placement is Placement.WHOLE else base
    assert probe.snapshot(model).tensors == wanted.tensors
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(base) == []


def test_an_error_in_the_last_step_undoes_all(model, lora, probe, monkeypatch):
    report = qwenlora.compose_loras(model, lora[0])
    before = probe.snapshot(model)

    def failing(done):
        def failed(journal, state):
            done(journal, state)
            raise RuntimeError("injected after the record was written")

        return failed

    faults.replace(monkeypatch, [faults.DONE], failing)
    with pytest.raises(RuntimeError, match="injected after"):
        qwenlora.compose_loras(model, (lora[0], 0.5))
    assert probe.snapshot(model).differences(before) == []
    assert qwenlora.applied(model) is report


@pytest.mark.parametrize("placement", [Placement.WHOLE, Placement.BY_PATH])
@pytest.mark.parametrize("from_base", [True, False])
def test_a_second_interruption_while_cleaning_up_loses_nothing(
    placement, from_base, model, lora, probe, monkeypatch
):
    """What even the cleaning up could not do, the next call does first."""
    base = probe.snapshot(model)
    if not from_base:
        qwenlora.compose_loras(model, (lora[0], 0.25))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        points = [faults.DONE, faults.TO_BASE, faults.UNDONE]
        faults.replace(patch, points, faults.instead(interrupted))
        with pytest.raises(KeyboardInterrupt):
            qwenlora.compose_loras(model, lora[0], options=ComposeOptions(placement=placement))
    assert not qwenlora.applied(model).complete
    assert "interrupted" in qwenlora.applied(model).summary()
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(base) == []


def test_composing_within_composing_raises(model, lora, probe):
    before = probe.snapshot(model)

    def progress(phase, done, total):
        qwenlora.compose_loras(model, [])

    with pytest.raises(ModelStateError, match="this very thread"):
        qwenlora.compose_loras(model, lora[0], options=ComposeOptions(progress=progress))
    assert probe.snapshot(model).differences(before) == []
    qwenlora.compose_loras(model, lora[0])


def test_threads_wait_for_each_other(model, lora, probe):
    base = probe.snapshot(model)
    strengths = [0.1 * (i + 1) for i in range(8)]
    errors = []

    def work(strength):
        try:
            for _ in range(5):
                qwenlora.compose_loras(model, (lora[0], strength))
        except Exception as error:  # noqa: BLE001 - whatever it is, it fails the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(s,)) for s in strengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert qwenlora.applied(model).loras[0].strength in strengths
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(base) == []


@pytest.mark.parametrize("placement", list(Placement))
def test_a_change_of_strengths_that_fails_leaves_the_old_ones(
    placement, Draft, make_model, probe, tmp_path
):
    model = make_model(num_layers=3)
    draft = Draft(1)
    for block in range(3):
        draft.add(f"transformer_blocks.{block}.attn.to_out.0", 16)
    path = draft.save(tmp_path / "lora.safetensors")
    # One slot in a load: two are written when the third is announced.
    one_by_one = ComposeOptions(staging_bytes=1)
    qwenlora.compose_loras(model, (path, 1.0), options=one_by_one)
    before = probe.snapshot(model)
    told = []

    def progress(phase, done, total):
        told.append(phase)
        if done == 2:
            raise KeyboardInterrupt

    options = replace(one_by_one, placement=placement, progress=progress)
    with pytest.raises(KeyboardInterrupt):
        qwenlora.compose_loras(model, (path, 0.5), options=options)
    assert set(told) == {"write"}  # nothing was read
    assert probe.snapshot(model).differences(before) == []
    assert qwenlora.applied(model).failure is None
    assert qwenlora.applied(model).loras[0].strength == 1.0
