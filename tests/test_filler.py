"""Recipes that are carried out on other threads: in order, without a race for memory."""

from __future__ import annotations

import _thread
import gc
import itertools
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from qwenlora import _core
from qwenlora.group.filler import Filler

TILE_BYTES = 512
LONG = 60
"""Seconds that nothing here takes: a test that waits so long has failed."""


def threads_alive():
    """Rust's threads that fill memory."""
    names = (path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
    return sum(name.startswith("qwenlora-fill") for name in names)


@pytest.fixture
def own():
    made = Filler(threads=2)
    yield made
    made.close()
    if sys.platform == "linux":
        assert threads_alive() == 0


class Gate:
    """Fillers that begin nothing until it is opened."""

    def __init__(self, fillers):
        self.opened = threading.Event()
        self._fillers = fillers

    def fill(self, recipes):
        return Held(self.opened, lambda: self._fillers.fill(recipes))

    def close(self):
        self._fillers.close()


class Held:
    def __init__(self, opened, begin):
        self._opened, self._begin = opened, begin

    def query(self):
        return self._opened.is_set()

    def wait(self):
        assert self._opened.wait(LONG)
        self._begin().wait()


@pytest.fixture
def gate(own):
    own._fillers = Gate(_core.Fillers(threads=2))
    yield own._fillers
    own._fillers.opened.set()


def memory():
    return np.full(TILE_BYTES, 7, dtype=np.uint8)


def copying(dest, source):
    """Fill one fragment with another."""
    return [(dest, 1, 16, 2, [("fragments", [(source, 1)], 0, 1)])]


def wrong():
    return [(memory(), 1, 8, 2, [("zero", 1)])]


def test_recipes_are_carried_out_in_order(own):
    places = [np.full(TILE_BYTES, 255, dtype=np.uint8), *(memory() for _ in range(20))]
    # Each copies what the one before it has copied.
    for source, dest in itertools.pairwise(places):
        own.fill(copying(dest, source))
    own.wait()
    assert all((place == 255).all() for place in places)
    assert own.begun() is None


def test_filling_goes_on_beside(own, gate):
    dests = [memory() for _ in range(3)]
    source = np.zeros(TILE_BYTES, dtype=np.uint8)
    assert own.begun() is None
    for dest in dests:
        own.fill(copying(dest, source))
    last = own.begun()
    assert not last.query()
    # A fourth waits for the first.
    fourth = memory()
    thread = threading.Thread(target=own.fill, args=[copying(fourth, source)])
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    gate.opened.set()
    thread.join(LONG)
    assert not thread.is_alive()
    own.wait()
    assert not any(place.any() for place in (*dests, fourth))


def test_an_error_is_told_at_once_and_begins_nothing(own):
    with pytest.raises(ValueError, match="multiple of 16"):
        own.fill(wrong())
    assert own.begun() is None
    dest = memory()
    own.fill(copying(dest, np.zeros(TILE_BYTES, dtype=np.uint8)))
    own.wait()
    assert not dest.any()


def test_closing_waits():
    own, dests = Filler(threads=1), [np.full(1 << 22, 7, dtype=np.uint8) for _ in range(3)]
    for dest in dests:
        own.fill([(dest, 1, 16, 2, [("zero", dest.nbytes // TILE_BYTES)])])
    copied = own.begun()
    own.close()
    assert copied.query()
    assert not any(dest.any() for dest in dests)
    with pytest.raises(ValueError, match="the fillers are closed"):
        own.fill(copying(memory(), memory()))


def test_nothing_to_wait_for():
    own = Filler()
    own.wait()
    own.close()


# ---- memory that is lent ----


@pytest.fixture
def fillers():
    made = _core.Fillers(threads=4)
    yield made
    made.close()


def large(value):
    return np.full(8 << 20, value, dtype=np.uint8)


def zeroing(dest):
    return [(dest, 1, 16, 2, [("zero", dest.nbytes // TILE_BYTES)])]


def copied(dest, source):
    tiles = dest.nbytes // TILE_BYTES
    return [(dest, 1, 16, 2, [("fragments", [(source, tiles)], 0, tiles)])]


def test_the_last_of_several_over_one_place_counts(fillers):
    place, source, copy = large(1), large(9), large(0)
    for _ in range(5):
        fillers.fill(zeroing(place))
        fillers.fill(copied(place, source))
        fillers.fill(copied(copy, place)).wait()
        assert (place == 9).all()
        assert (copy == 9).all()
        copy[:] = 0


@pytest.mark.parametrize("second", ["write", "read", "write what is read"])
def test_memory_that_is_in_use_is_not_lent_again(second, fillers):
    """The second request is begun when the first is done."""
    one, other = (np.full(64 << 20, value, dtype=np.uint8) for value in (1, 2))
    first = fillers.fill(copied(one, other) if second == "write what is read" else zeroing(one))
    recipes = {"write": zeroing(one), "read": copied(other, one)}.get(second, zeroing(other))
    after = fillers.fill(recipes)
    assert first.query()
    after.wait()


def test_memory_that_is_only_read_is_lent_to_several(fillers):
    source, dests = large(3), [large(0) for _ in range(3)]
    begun = [fillers.fill(copied(dest, source)) for dest in dests]
    begun[-1].wait()
    assert all((dest == 3).all() for dest in dests)


def test_views_of_one_array_may_be_filled_together(fillers):
    whole = large(1)
    halves = [whole[: 4 << 20], whole[4 << 20 :]]
    begun = [fillers.fill(zeroing(half)) for half in halves]
    for filling in begun:
        filling.wait()
    assert not whole.any()


@pytest.mark.slow
def test_memory_is_kept_while_it_is_used(fillers):
    tiles = (8 << 20) // TILE_BYTES
    for value in range(20):
        dest, sources = large(0), [(large(value), tiles)]
        filling = fillers.fill([(dest, 1, 16, 2, [("fragments", sources, 0, tiles)])])
        # What is freed is taken again at once, and written to.
        sources.clear()
        del sources
        gc.collect()
        large(255)
        filling.wait()
        assert (dest == value).all()


def test_a_filling_that_nobody_waits_for_is_done_when_it_is_gone(fillers):
    dest = large(1)
    filling = fillers.fill(zeroing(dest))
    del filling
    assert not dest.any()


def test_waiting_and_asking_any_number_of_times(fillers):
    filling = fillers.fill(zeroing(large(1)))
    filling.synchronize()
    assert filling.query()
    assert filling.wait() is None
    assert filling.wait() is None


def test_many_threads_ask(fillers):
    """Recipes of one place, from several threads: in the end one of them fills all of it."""
    memory, done = torch.zeros(8 << 20, dtype=torch.uint8), []
    sources = [large(value) for value in range(1, 5)]

    def ask(source):
        place = memory[:].numpy()  # an array of its own: NumPy lends none to two at a time
        for _ in range(5):
            fillers.fill(copied(place, source)).wait()
            done.append(source)

    threads = [threading.Thread(target=ask, args=[source]) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert len(done) == 4 * 5
    assert any((memory == value).all() for value in range(1, 5))


# ---- interrupts ----

SLOTS, MEMBERS = 32, 4096


@pytest.fixture
def interrupted():
    """Calls something with an interrupt that is pending: only what waits in there comes upon it."""

    def call(function, *args):
        with pytest.raises(KeyboardInterrupt):
            # Python looks for interrupts between its own instructions: there is none in here.
            list(map(partial.__call__, [partial(_thread.interrupt_main), partial(function, *args)]))

    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield call
    signal.signal(signal.SIGINT, kept)


def slow(dest):
    """Fill 64 MiB with 1 from so many small factors that one thread takes a while."""
    source = np.full(SLOTS * TILE_BYTES, 1, dtype=np.uint8)
    members = [(source, None, 16 * at, 16, 16, 0) for at in range(MEMBERS)]
    return [(dest, SLOTS, 16 * MEMBERS, 2, [("up", 1, members)])]


def slow_memory():
    return np.full(SLOTS * MEMBERS * TILE_BYTES, 7, dtype=np.uint8)


TRIES = 20
"""A thread may be so late that all was filled before the interrupt came: then once more."""


@pytest.mark.slow
@pytest.mark.parametrize("after", ["waits again", "lets go", "closes"])
def test_a_wait_that_is_interrupted_loses_nothing(after, interrupted):
    dest = slow_memory()
    for _ in range(TRIES):
        fillers = _core.Fillers(threads=1)
        dest[:] = 7
        filling = fillers.fill(slow(dest))
        interrupted(filling.wait)
        was_filling = not filling.query()
        if after == "waits again":
            filling.wait()
        elif after == "closes":
            fillers.close()
        del filling
        # Nobody writes to it any more.
        assert (dest == 1).all()
        dest[:] = 9
        fillers.close()
        assert (dest == 9).all()
        if was_filling:
            return
    pytest.fail("no wait was interrupted")


def test_what_waits_for_memory_in_use_can_be_interrupted(interrupted):
    dest = slow_memory()
    for _ in range(TRIES):
        fillers = _core.Fillers(threads=1)
        dest[:] = 7
        filling = fillers.fill(slow(dest))
        interrupted(fillers.fill, zeroing(dest))
        was_filling = not filling.query()
        filling.wait()
        # Where it came too late, the second request was begun, and done when its filling was gone.
        assert (dest == 1).all() or not was_filling
        # The arrays are nobody's.
        fillers.fill(zeroing(dest)).wait()
        assert not dest.any()
        fillers.close()
        if was_filling:
            return
    pytest.fail("nothing was interrupted")


@pytest.mark.slow
def test_a_filler_that_is_interrupted_can_be_closed(own, interrupted):
    dests = [slow_memory() for _ in range(2)]
    for dest in dests:
        own.fill(slow(dest))
    interrupted(own.wait)
    own.close()
    assert all((dest == 1).all() for dest in dests)
