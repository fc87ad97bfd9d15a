"""Memory that other threads may still be writing: it is read by waiting alone."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch

from qwenlora.emulation import delay
from qwenlora.emulation.delay import LazyWorkers, SleepyWorkers
from qwenlora.group.filler import Filler
from qwenlora.group.host_arena import HostFactor, HostPackedArena
from qwenlora.slots.find import find_targets
from qwenlora.work import workers
from qwenlora.work.pending import Pending

LONG = 60


def test_a_value_comes_out_by_waiting():
    calls = []

    def wait():
        calls.append("waited")
        return 3

    doubled = Pending(wait).then(lambda value: 2 * value)
    assert calls == []
    assert doubled.wait() == 6
    assert calls == ["waited"]
    assert Pending.ready("here").wait() == "here"


def test_what_writing_raised_is_raised():
    def failed():
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        Pending(failed).then(len).wait()


@pytest.mark.parametrize("delayed", [LazyWorkers(), SleepyWorkers(0, longest_seconds=0.05)])
@pytest.mark.parametrize("look", ["factors", "finite", "clear"])
def test_every_look_at_an_arena_waits(delayed, look, make_model):
    targets = [t for t in find_targets(make_model(), {}).values() if t.path.endswith("to_qkv")]
    with workers.employ(delayed):
        filler = Filler(threads=1)
        arena = HostPackedArena(targets, 16, filler=filler)
        arena._copy_bases(1, "zero")
        assert not filler.begun().query()
        found = getattr(arena, look)()
        if look == "factors":
            # Where the tensors lie is known at once; what is in them is not.
            assert not filler.begun().query()
            found.wait()
        assert filler.begun() is None or filler.begun().query()
        assert all(torch.isfinite(factor.wait()).all() for factor in arena._factors)
        filler.close()


def test_a_factor_has_no_other_way_to_its_memory():
    public = {name for name in vars(HostFactor) if not name.startswith("_")}
    assert public == {"base", "dtype", "forget_olds", "recipe", "slots", "wait"}


def test_lazy_work_is_done_in_order_when_the_last_is_waited_for():
    places = [np.full(512, 255, dtype=np.uint8), *(np.zeros(512, np.uint8) for _ in range(4))]
    fillers = LazyWorkers().fillers(2)
    fillings = [
        fillers.fill([(dest, 1, 16, 2, [("fragments", [(source, 1)], 0, 1)])])
        for source, dest in itertools.pairwise(places)
    ]
    fillings[-1].wait()
    assert all(filling.query() for filling in fillings)
    assert all((place == 255).all() for place in places)
    fillers.close()


def test_employing_ends_with_the_block():
    before, lazy, seen = workers.employed(), LazyWorkers(), []
    with workers.employ(lazy):
        # Whoever composes on another thread is delayed as well.
        thread = threading.Thread(target=lambda: seen.append(workers.employed()))
        thread.start()
        thread.join(LONG)
    assert seen == [lazy]
    assert workers.employed() is before


def test_all_who_wait_for_a_lazy_filling_wait_until_it_is_done():
    """One thread carries it out; the others, who ask meanwhile, are not answered too early."""
    begun, go_on = threading.Event(), threading.Event()
    filled = []

    def fill():
        begun.set()
        assert go_on.wait(LONG)
        filled.append(True)

    filling = delay._LazyFilling(None, fill, threading.RLock())
    seen = []
    threads = [threading.Thread(target=lambda: (filling.wait(), seen.append(list(filled))))]
    threads[0].start()
    assert begun.wait(LONG)
    threads.append(threading.Thread(target=lambda: (filling.wait(), seen.append(list(filled)))))
    threads[1].start()
    threads[1].join(0.05)
    assert threads[1].is_alive()
    assert not filling.query()
    go_on.set()
    for thread in threads:
        thread.join(LONG)
    assert seen == [[True], [True]]
    assert filling.query()
