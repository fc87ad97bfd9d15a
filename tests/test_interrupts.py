"""An exception at every instruction of what takes a lock, or writes to a model: all goes on."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import sys
import threading
import time
from collections import Counter
from types import CodeType, FrameType
from typing import TYPE_CHECKING

import pytest
import torch

import qwenlora
from qwenlora import ComfyQwenImageWrapper, ComposeOptions, Placement, cache, runtime
from qwenlora.compose import bring, compose, journal, rescale, steps
from qwenlora.compose import placer as placement
from qwenlora.errors import ModelStateError
from qwenlora.model import lock as lock_module
from qwenlora.model import state
from qwenlora.model.lock import ModelLock, lock_of
from qwenlora.model.state import read_state
from qwenlora.slots import branch, packed, point, slot, value

from . import faults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ERRORS = [KeyboardInterrupt, TimeoutError]
"""What passes by hooks that are always called, and what does not."""


def codes_of(*owners: object) -> set[CodeType]:
    """The code of functions, of all methods of classes, and of functions within these."""
    found: set[CodeType] = set()
    waiting: list[object] = [*owners]
    while waiting:
        owner = waiting.pop()
        if isinstance(owner, type):
            waiting += vars(owner).values()
        elif isinstance(owner, CodeType):
            found.add(owner)
            waiting += owner.co_consts
        elif (code := getattr(owner, "__code__", None)) is not None:
            waiting.append(code)
        elif (function := getattr(owner, "fget", None)) is not None:
            waiting.append(function)
    return found


class Interruption:
    """Raises once, before the n-th instruction that some functions run; `count` were run."""

    def __init__(
        self, codes: set[CodeType], at: int, error: type[BaseException], *, again: int = 0
    ) -> None:
        """With `again` it raises once more, so many instructions later."""
        self._watch = WATCH(codes, self._instruction)
        self._places = {at, at + again}
        self._error = error
        self.count = 0
        self.raised = 0

    @property
    def happened(self) -> bool:
        return self.raised > 0

    def __enter__(self) -> Interruption:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.stop()

    def _instruction(self) -> bool:
        """Count one; tell if the next one matters, too."""
        at, self.count = self.count, self.count + 1
        if at in self._places:
            self.raised += 1
            raise self._error(f"injected before instruction {at}")
        return self.raised < len(self._places)


class Monitor:
    """Calls before each instruction of some functions in this thread; it may raise."""

    TOOL = 3

    def __init__(self, codes: set[CodeType], call: Callable[[], bool]) -> None:
        self._codes = codes
        self._call = call

    def start(self) -> None:
        thread, call, told = threading.get_ident(), self._call, [True]

        def tell(_code: CodeType, _offset: int) -> None:
            if told[0] and threading.get_ident() == thread:
                told[0] = call()

        sys.monitoring.use_tool_id(self.TOOL, "interruptions")
        sys.monitoring.register_callback(self.TOOL, sys.monitoring.events.INSTRUCTION, tell)
        self._set(sys.monitoring.events.INSTRUCTION)

    def stop(self) -> None:
        self._set(0)
        sys.monitoring.free_tool_id(self.TOOL)

    def _set(self, events: int) -> None:
        for code in self._codes:
            sys.monitoring.set_local_events(self.TOOL, code, events)


class Tracer:
    """The same, where Python has no monitoring yet."""

    def __init__(self, codes: set[CodeType], call: Callable[[], bool]) -> None:
        # A code object's own hash goes through all that the code consists of.
        self._codes = {id(code): code for code in codes}
        self._call = call
        self._is_told = True

    def start(self) -> None:
        self._kept = sys.gettrace(), sys.getprofile()
        sys.settrace(self._enter)

    def stop(self) -> None:
        trace, profile = self._kept
        sys.settrace(trace)
        sys.setprofile(profile)

    def _enter(self, frame: FrameType, _event: str, _argument: object) -> Callable | None:
        if self._is_told and id(frame.f_code) in self._codes:
            return self._follow(frame)
        return None

    def _follow(self, frame: FrameType) -> Callable:
        frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines = self._tell, True, False
        return self._tell

    def _tell(self, _frame: FrameType, event: str, _argument: object) -> Callable:
        if event == "opcode" and self._is_told:
            try:
                self._is_told = self._call()
            except BaseException:
                # Python stops tracing when a trace function raises, but goes on with profiling.
                sys.setprofile(self._resume)
                raise
        return self._tell

    def _resume(self, frame: FrameType | None, _event: str, _argument: object) -> None:
        """Trace again from the first call or return after an error."""
        sys.setprofile(None)
        while frame is not None:
            if id(frame.f_code) in self._codes:
                self._follow(frame)
            frame = frame.f_back
        sys.settrace(self._enter)


WATCH = Monitor if sys.version_info >= (3, 12) else Tracer


def interrupted_everywhere(
    codes: set[CodeType], error: type[BaseException], act: Callable[[], object]
) -> Iterable[int]:
    """Run `act` once for each of its instructions, interrupted there; yields after each."""
    at = 0
    while True:
        with Interruption(codes, at, error) as interruption:
            try:
                act()
            except error:
                assert interruption.happened
        if not interruption.happened:
            return
        yield at
        at += 1


def in_thread(act: Callable[[], object]) -> None:
    """Run it in another thread, which must end."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for ever"


def in_own_thread(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a thread of its own.

    An error at any instruction may come in the middle of Python's own bookkeeping of the error that
    is being handled. The thread then handles it for ever, and keeps all that its frames hold.
    """

    @functools.wraps(test)
    def run(*args: object, **options: object) -> None:
        raised: list[BaseException] = []

        def act() -> None:
            try:
                test(*args, **options)
            except BaseException as error:  # noqa: BLE001
                raised.append(error)

        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
        if raised:
            raise raised.pop()

    return run


def leave_abandoned(lock: ModelLock) -> None:
    """Hold it in a frame that is over."""
    lock.acquire(sys._getframe())


LOCK_CODES = codes_of(lock_module.ModelLock, lock_module._Claim, lock_module.lock_of)


@pytest.mark.slow
@pytest.mark.parametrize("next_in", ["this thread", "another thread"])
@pytest.mark.parametrize("before", ["free", "abandoned here", "abandoned by another thread"])
def test_the_lock_is_free_after_an_interruption_at_every_instruction(before, next_in):
    model = torch.nn.Identity()

    def use() -> None:
        with lock_of(model):
            assert lock_of(model).is_mine()

    def prepare() -> None:
        if before == "abandoned here":
            leave_abandoned(lock_of(model))
        elif before == "abandoned by another thread":
            in_thread(lambda: leave_abandoned(lock_of(model)))

    count = 0
    prepare()
    for _ in interrupted_everywhere(LOCK_CODES | codes_of(use), KeyboardInterrupt, use):
        assert not lock_of(model).is_mine()
        use() if next_in == "this thread" else in_thread(use)
        count += 1
        prepare()
    assert count > 100


@pytest.mark.slow
def test_an_interruption_while_another_thread_holds_it():
    lock = ModelLock()

    def use() -> None:
        """Wait while another thread holds it, which lets go when this one waits."""
        held, asked = threading.Event(), threading.Event()

        def hold() -> None:
            with lock:
                held.set()
                asked.wait(20)
                while not lock._bells and not left:
                    time.sleep(0)

        left: list[bool] = []
        holder = threading.Thread(target=hold, daemon=True)
        holder.start()
        held.wait(20)
        asked.set()
        try:
            with lock:
                assert lock.is_mine()
        finally:
            left.append(True)
            holder.join(20)
            assert not holder.is_alive()

    count = 0
    for _ in interrupted_everywhere(LOCK_CODES, KeyboardInterrupt, use):
        use()
        count += 1
    assert count > 100


HOOK_CODES = LOCK_CODES | codes_of(
    runtime._before_forward,
    runtime._before_forward.__wrapped__,
    runtime._after_forward.__wrapped__,
    runtime._forward_frame,
    torch.nn.Module._call_impl,
)


@pytest.fixture
def quick(model, monkeypatch):
    """A transformer with a wrapper, whose forward does nothing but what a test asks of it."""
    within: list[Callable[[], object]] = []
    monkeypatch.setattr(model, "forward", lambda: [act() for act in within], raising=False)
    ComfyQwenImageWrapper.of(model)
    model()
    return model, within


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
@in_own_thread
def test_a_forward_after_an_interruption_at_every_instruction_of_its_hooks(error, quick):
    model, _ = quick
    count = 0
    for at in interrupted_everywhere(HOOK_CODES, error, model):
        assert not lock_of(model).is_mine()
        model() if at % 2 else in_thread(model)
        count += 1
    assert count > 300


# PyTorch tells of an error in a hook that it calls because of another.
@pytest.mark.filterwarnings("ignore:module forward hook")
@pytest.mark.parametrize("error", ERRORS)
def test_the_outer_forward_keeps_the_lock_however_the_inner_one_is_refused(error, quick):
    model, within = quick
    held: list[bool] = []
    outer = [False]

    def again() -> None:
        if outer[0]:
            return
        outer[0] = True
        with Interruption(HOOK_CODES, next(places), error) as interruption:
            try:
                model()
            except (ModelStateError, error):
                pass
            else:
                raise AssertionError("a forward ran within a forward")
        happened.append(interruption.happened)
        held.append(lock_of(model).is_mine())

    within.append(again)
    places, happened = itertools.count(), [True]
    while happened[-1]:
        outer[0] = False
        model()
        assert not lock_of(model).is_mine()
    assert len(held) > 100
    assert all(held)


def test_a_frame_that_took_the_place_of_the_holders_is_not_the_holder():
    lock = ModelLock()
    for _ in range(1000):
        # Frames of one function come to lie where the last one lay.
        leave_abandoned(lock)
    assert not lock.is_mine()


def test_a_frame_is_left_as_it_was():
    lock, frame = ModelLock(), sys._getframe()
    before = frame.f_trace
    with lock:
        pass
    assert frame.f_trace is before


def test_a_traced_holder_is_known(monkeypatch):
    """A debugger's own trace function stays on the frame, also where it comes later."""
    lock, frame = ModelLock(), sys._getframe()

    def tracer(*_):
        return None

    for late in (False, True):
        kept = frame.f_trace
        if not late:
            frame.f_trace = tracer
        with lock:
            frame.f_trace = tracer
            assert lock.is_mine()
            with pytest.raises(ModelStateError):
                lock.acquire(frame)
        assert frame.f_trace is tracer
        frame.f_trace = kept
        assert not lock.is_mine()


@pytest.mark.parametrize("how", ["let go", "abandoned"])
def test_the_lock_does_not_keep_what_the_holder_knows(how):
    class Known:
        pass

    lock = ModelLock()
    gone: list[bool] = []

    def hold() -> None:
        import weakref

        known = Known()
        weakref.finalize(known, gone.append, True)
        if how == "let go":
            with lock:
                pass
        else:
            lock.acquire(sys._getframe())

    hold()
    assert gone == [True]


# ---- writing to a model ----

JOURNAL_CODES = codes_of(
    compose.compose_loras,
    bring.bring,
    bring._brought,
    bring._cleaned,
    bring._rescaled,
    steps.compose,
    steps.Parted,
    journal.Journal,
    placement.Placer.whole,
    placement.Placer.by_path,
    placement.Placer._replace,
    journal.restore_all,
    rescale.Rescaling,
    rescale._Write,
    slot.Changes,
    packed.PackedChange.make,
    packed.PackedChange.unmake,
    branch.BranchChange.make,
    branch.BranchChange.unmake,
    value._ValueChange.make,
    value._ValueChange.unmake,
    value._ValueChange._record,
    point.point,
    point.point_all,
    point.point_back,
    packed.PackedSlot.restore,
    branch.SideBranchSlot.restore,
    value.ValueSlot.restore,
    branch.set_branch,
    branch._remove_hook,
    state.write_state,
    state.write_default,
    torch.nn.Module.register_forward_hook,
    torch.nn.Module.register_buffer,
)


Place = tuple[tuple[CodeType, int], ...]
"""An instruction of a function, and those of all its callers."""


class Written:
    """A tiny model, and what it holds before and after a change."""

    def __init__(self, make_model, probe, draft, folder, *, change: str, options) -> None:
        self._probe = probe
        # Stored values cannot be rescaled where they lie.
        values = change != "rescale"
        first, second = (self._file(draft(s), folder / f"{s}", values=values) for s in (1, 2))
        begin, end = {
            "compose": ([], [second]),
            "replace": ([first], [second]),
            "reset": ([first], []),
            "rescale": ([(first, 1.0)], [(first, 0.5)]),
        }[change]
        self.stacks = {"before": begin, "after": end}
        self.options = options
        self.model = make_model()
        self.base = probe.snapshot(self.model)
        self.held, self.told = {}, {}
        for name, stack in self.stacks.items():
            self.told[name] = qwenlora.compose_loras(self.model, stack, options=options)
            self.held[name] = probe.snapshot(self.model).tensors
        assert (self.held["before"] == self.held["after"]) is False
        self.restart()

    def places(self) -> list[tuple[Place, bool]]:
        """Of each instruction of the change: where it lies, and if the model is then written to."""
        record, places = read_state(self.model), []

        def note() -> bool:
            frame, place = sys._getframe(2), []
            while frame.f_code is not Written.change.__code__:
                place.append((frame.f_code, frame.f_lasti))
                frame = frame.f_back
            places.append((tuple(place), read_state(self.model) is not record))
            return True

        watch = WATCH(JOURNAL_CODES, note)
        watch.start()
        try:
            self.change()
        finally:
            watch.stop()
        self.restart()
        return places

    def _file(self, draft, path, *, values):
        rank = 4 if path.name == "1" else 20
        draft.add("img_in", rank).add("transformer_blocks.0.attn.to_out.0", rank)
        if values:
            draft.put("proj_out", "diff_b", 64)
        return draft.save(path.with_suffix(".safetensors"))

    def restart(self) -> None:
        qwenlora.compose_loras(self.model, self.stacks["before"], options=self.options)

    def change(self) -> None:
        qwenlora.compose_loras(self.model, self.stacks["after"], options=self.options)

    def check_truth(self) -> None:
        """What is said to be in the model is there, bit for bit."""
        assert not lock_of(self.model).is_mine()
        if read_state(self.model).in_flight:
            assert not qwenlora.applied(self.model).complete
            return
        report, tensors = qwenlora.applied(self.model), self._probe.values(self.model)
        if report.failure is not None:
            assert tensors == self.base.tensors
            return
        key = [(lora.name, lora.strength) for lora in report.loras]
        names = [n for n, r in self.told.items() if key == [(o.name, o.strength) for o in r.loras]]
        assert any(tensors == self.held[name] for name in names)

    def check_next(self, then: str) -> None:
        """The next change is right, whichever it is."""
        if then == "reset":
            qwenlora.reset_loras(self.model)
            assert self._probe.snapshot(self.model).differences(self.base) == []
        elif then == "after":
            self.change()
            assert self._probe.values(self.model) == self.held["after"]
        self.restart()
        assert self._probe.values(self.model) == self.held["before"]

    def interrupt(self, turn: int, *, at: int, again: int = 0) -> int:
        """Change it, interrupted before an instruction, and check it; how often it was.

        With `again` it is interrupted once more, so many instructions later.
        """
        record = read_state(self.model)
        interruption = Interruption(JOURNAL_CODES, at, KeyboardInterrupt, again=again)
        with interruption, contextlib.suppress(KeyboardInterrupt):
            self.change()
        try:
            self.check_truth()
            if read_state(self.model) is not record:
                self.check_next(NEXT[turn % len(NEXT)])
            # Where nothing was written yet, several interruptions may come before the next change.
            elif turn % len(NEXT) == 0:
                self.check_next(NEXT[turn // len(NEXT) % len(NEXT)])
        except (AssertionError, qwenlora.QwenLoraError) as error:
            raise AssertionError(f"interrupted before instruction {at}, {again} later") from error
        return interruption.raised


NEXT = ["before", "after", "reset"]
"""What comes after an interruption; each time another."""


CHANGES = ["compose", "replace", "reset", "rescale"]
PLACEMENTS = [Placement.WHOLE, Placement.BY_PATH]


@pytest.fixture(params=CHANGES)
def change(request):
    return request.param


@pytest.fixture(params=PLACEMENTS)
def placement(request):
    return request.param


@pytest.fixture(scope="module")
def make_written(make_model, probe, Draft, tmp_path_factory):
    def made(change: str, placement: Placement) -> Written:
        folder, options = tmp_path_factory.mktemp(change), ComposeOptions(placement=placement)
        return Written(make_model, probe, Draft, folder, change=change, options=options)

    return made


@pytest.fixture
def written(change, placement, make_written):
    return make_written(change, placement)


@pytest.fixture(scope="module")
def taken(make_written):
    """The instructions that are interrupted, by change and placement; the others are alike.

    Where the model is not written to yet it is what it was, and each place is taken once. Where it
    is, each change takes each place: the first and the last time that it comes there. What both
    placements come to is taken in one of them.
    """
    taken: dict[tuple[str, Placement], list[int]] = {}
    known: set[object] = set()
    for change, placement in itertools.product(CHANGES, PLACEMENTS):
        places = make_written(change, placement).places()
        last = {place: at for at, (place, _) in enumerate(places)}
        own = taken[change, placement] = []
        seen: set[Place] = set()
        for at, (place, is_written) in enumerate(places):
            key: object = (change, place, place in seen) if is_written else place
            if key not in known and (place not in seen or at == last[place]):
                known.add(key)
                own.append(at)
            seen.add(place)
        assert len(places) > 1000
    return taken


@pytest.mark.slow
@in_own_thread
def test_a_model_after_an_interruption_at_every_instruction(change, placement, written, taken):
    for turn, at in enumerate(taken[change, placement]):
        assert written.interrupt(turn, at=at), at
    # All instructions are counted as `taken` counted them.
    assert written.interrupt(0, at=len(written.places())) == 0
    assert turn > 100


AGAIN = [1, 3, 7, 19, 47, 113, 257]
"""How many instructions later there is a second interruption."""


@pytest.mark.slow
@in_own_thread
def test_a_model_after_two_interruptions(written):
    # Two of them are too many to be tried everywhere.
    counts = Counter()
    for turn, again in enumerate(itertools.cycle(AGAIN)):
        raised = written.interrupt(turn, at=11 * turn, again=again)
        counts[raised] += 1
        if not raised:
            break
    assert counts[2] > 50


def change_of(layer, *, new, base):
    """A change of a layer's bias, and the base's that is kept; None where `new` is that."""
    kept = {} if base is None else {"bias": base}
    return value._ValueChange(layer, value.PARAMETERS, new={"bias": new}, kept=kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begins_with", "ends_with"),
    [
        ("other values", "base"),
        pytest.param("base", "base", marks=pytest.mark.slow),
        pytest.param("base", "other values", marks=pytest.mark.slow),
        pytest.param("other values", "other values", marks=pytest.mark.slow),
    ],
)
@in_own_thread
def test_base_values_are_known_after_any_two_interruptions(begins_with, ends_with):
    """One while a change is made, or at any time before, and one while it is unmade."""
    base, other = torch.zeros(4), torch.ones(4)
    codes = codes_of(value._ValueChange, point.point, point.point_back)
    counts = Counter()
    for at in itertools.count():
        for again in itertools.count(1):
            layer = torch.nn.Linear(4, 4)
            layer.bias.data = base
            if begins_with == "other values":
                change_of(layer, new=torch.ones(4), base=base).make()
            is_base = ends_with == "base"
            change = change_of(
                layer, new=base if is_base else other, base=None if is_base else base
            )
            with Interruption(codes, at, KeyboardInterrupt, again=again) as interruption:
                with contextlib.suppress(KeyboardInterrupt):
                    try:
                        change.make()
                    except KeyboardInterrupt:
                        change.unmake()
            kept = vars(layer).get(value.BASE_VALUES, {"bias": layer.bias.data})
            assert kept["bias"].data_ptr() == base.data_ptr(), (at, again)
            counts[interruption.raised] += 1
            if interruption.raised < 2:
                break
        if not interruption.raised:
            break
    assert counts[2] > 1000


@pytest.mark.parametrize("last", [faults.WRITTEN, faults.RESCALED])
def test_strengths_are_known_after_an_interruption_behind_the_last_write(
    last, model, lora, probe, monkeypatch
):
    """The old strengths, asked for again, are not taken to lie in the slots still."""
    qwenlora.compose_loras(model, (lora[0], 1.0))
    before = probe.snapshot(model)

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        faults.replace(patch, [last], faults.after(interrupted))
        with pytest.raises(KeyboardInterrupt):
            qwenlora.compose_loras(model, (lora[0], 0.5))
    qwenlora.compose_loras(model, (lora[0], 1.0))
    assert probe.snapshot(model).tensors == before.tensors


@pytest.mark.parametrize("half", ["proj_down", "proj_up"])
def test_a_slot_of_two_ranks_is_found_after_a_second_interruption(
    half, model, lora, probe, monkeypatch
):
    base = probe.snapshot(model)

    def halves(change):
        at = ["proj_down", "proj_up"].index(half)
        old, new = change.old[at], change.new.wait()[at]
        owners = [target.owner for target in change.targets]
        point.point_all(owners, half, old, new, plain=False)
        raise KeyboardInterrupt

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        faults.replace(patch, [faults.MAKE], faults.instead(halves))
        faults.replace(patch, [faults.UNMAKE], faults.instead(interrupted))
        with pytest.raises(KeyboardInterrupt):
            qwenlora.compose_loras(model, lora[0])
    assert not qwenlora.applied(model).complete
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(base) == []


WRAPPER_CODES = codes_of(
    ComfyQwenImageWrapper.of.__func__,
    runtime._is_hooked,
    runtime._unhook,
    torch.nn.Module.register_forward_pre_hook,
    torch.nn.Module.register_forward_hook,
)


@pytest.mark.slow
@in_own_thread
def test_a_wrapper_is_whole_after_an_interruption_at_every_instruction(model, lora, probe):
    expected = copy.deepcopy(model)
    qwenlora.compose_loras(expected, lora[0])
    output = probe.output(expected)
    ats = itertools.count()
    interrupted = True
    while interrupted:
        own = copy.deepcopy(model)
        at = next(ats)
        with Interruption(WRAPPER_CODES, at, KeyboardInterrupt) as interruption:
            with contextlib.suppress(KeyboardInterrupt):
                ComfyQwenImageWrapper.of(own)
        interrupted = interruption.happened
        ComfyQwenImageWrapper.of(own).loras.append(lora[0])
        hooks = (own._forward_pre_hooks, own._forward_hooks)
        assert [len(found) for found in hooks] == [1, 1]
        if at % 10 == 0:
            assert torch.equal(probe.output(own), output)
        assert not lock_of(own).is_mine()
    assert at > 50


def test_offload_that_was_half_turned_on_is_turned_on(make_model, lora, probe, monkeypatch):
    from qwenlora.emulation import transformer

    model = make_model(num_layers=2)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    options = ComposeOptions(offload=True)
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "CPUOffloadManager", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qwenlora.compose_loras(model, lora[0], options=options)
    assert model.offload
    qwenlora.compose_loras(model, lora[0], options=options)
    assert model.offload_manager is not None


@pytest.mark.parametrize("act", ["put", "replace", "drop", "clear"])
def test_a_cache_counts_right_after_an_interruption_at_every_instruction(act):
    def use() -> None:
        if act == "clear":
            kept.clear()
        elif act == "drop":
            kept.fit(20)
        else:
            kept.put("new" if act == "put" else 1, Sized(30), limit_bytes=100)

    codes, at, interrupted = codes_of(cache.PieceCache), 0, True
    while interrupted:
        kept = cache.PieceCache()
        for key in range(3):
            kept.turn()
            kept.put(key, Sized(20), limit_bytes=100)
        with Interruption(codes, at, KeyboardInterrupt) as interruption:
            with contextlib.suppress(KeyboardInterrupt):
                use()
        interrupted = interruption.happened
        # No signal comes between the end of a `with` block and its exit, as this one may.
        kept._lock = threading.Lock()
        assert kept.nbytes == sum(own.nbytes for own in kept.values())
        at += 1
    assert at > 10


class Sized:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
