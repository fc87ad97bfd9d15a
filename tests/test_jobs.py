"""Threads that carry out jobs: results, errors, closing, and interrupts at every instruction."""

from __future__ import annotations

import _thread
import gc
import threading
import time
import weakref

import pytest

from qwenlora.work.jobs import Jobs

LONG = 20


@pytest.fixture
def jobs():
    made = Jobs(2)
    yield made
    made.close()


def wait_for_workers(count: int) -> None:
    """Wait until no more threads than that run."""
    end = time.monotonic() + LONG
    while _thread._count() > count and time.monotonic() < end:
        time.sleep(0.001)
    assert _thread._count() <= count


def test_results_in_any_order(jobs):
    before = _thread._count()
    begun = [jobs.submit(lambda i=i: i * i) for i in range(50)]
    assert [job.result() for job in reversed(begun)] == [i * i for i in range(49, -1, -1)]
    assert begun[3].result() == 9
    assert _thread._count() <= before + 2


def test_an_error_is_raised_where_the_result_is_asked_for(jobs):
    def fail():
        raise KeyError("injected")

    job = jobs.submit(fail)
    for _ in range(2):
        with pytest.raises(KeyError, match="injected"):
            job.result()
    assert jobs.submit(lambda: 1).result() == 1


def test_closing_waits_for_what_runs_and_begins_nothing_more(jobs):
    before = _thread._count()
    begun, go, done = threading.Barrier(3), threading.Event(), []

    def work():
        begun.wait(LONG)
        go.wait(LONG)
        done.append(1)

    for _ in range(10):
        jobs.submit(work)
    begun.wait(LONG)
    threading.Timer(0.02, go.set).start()
    jobs.close()
    assert done == [1, 1]
    wait_for_workers(before)
    assert done == [1, 1]


def test_threads_end_where_nobody_closes():
    before = _thread._count()
    jobs = Jobs(2)
    assert [jobs.submit(lambda: 1).result() for _ in range(3)] == [1, 1, 1]
    del jobs
    wait_for_workers(before)


def test_an_error_keeps_nothing_alive(jobs):
    class Held:
        pass

    held = Held()
    reference = weakref.ref(held)

    def fail(held=held):
        raise KeyError(str(held))

    job = jobs.submit(fail)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(KeyError):
            job.result()
        job.wait()
        del held, fail, job
        end = time.monotonic() + LONG
        while reference() is not None and time.monotonic() < end:
            time.sleep(0.001)
        assert reference() is None
    finally:
        gc.enable()
