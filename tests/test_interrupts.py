"""An exception at every instruction of what takes a lock: the next call works."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import CodeType, FrameType

import pytest
import torch

from qwenlora import lock as lock_module
from qwenlora import runtime
from qwenlora.errors import ModelStateError
from qwenlora.lock import ModelLock, lock_of
from qwenlora.runtime import ComfyQwenImageWrapper

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

    def __init__(self, codes: set[CodeType], at: int, error: type[BaseException]) -> None:
        self._codes = codes
        self._at = at
        self._error = error
        self.count = 0

    @property
    def happened(self) -> bool:
        return self.count > self._at

    def __enter__(self) -> Interruption:
        self._kept = sys.gettrace()
        # Python 3.12 looks only here whether any frame asks for instructions.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._kept)

    def _call(self, frame: FrameType, _event: str, _argument: object) -> Callable | None:
        if self.happened or frame.f_code not in self._codes:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._instruction

    def _instruction(self, _frame: FrameType, event: str, _argument: object) -> Callable | None:
        if event != "opcode" or self.happened:
            return self._instruction
        self.count += 1
        if self.happened:
            raise self._error(f"injected before instruction {self._at}")
        return self._instruction


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


def leave_abandoned(lock: ModelLock) -> None:
    """Hold it in a frame that is over."""
    lock.acquire(sys._getframe())


LOCK_CODES = codes_of(lock_module.ModelLock, lock_module._Claim, lock_module.lock_of)


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


@pytest.mark.parametrize("error", ERRORS)
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
