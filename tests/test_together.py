"""Tests that share what takes seconds to make run in one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from .conftest import TOGETHER, pytest_xdist_make_scheduler

ROOT = Path(__file__).parents[1]


class Process:
    """Takes what it is told to run, as a process of pytest-xdist does."""

    def __init__(self, name):
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.told = []

    def send_runtest_some(self, indices):
        self.told += indices

    def shutdown(self):
        self.shutting_down = True


@pytest.mark.parametrize("name", TOGETHER)
def test_a_name_is_that_of_a_folder_or_a_file(name):
    """Or of several files, by how their names begin."""
    found = [*ROOT.glob(f"{name}*")] if not name.endswith((".py", "/")) else [ROOT / name]
    assert found
    assert all(own.exists() and own.is_dir() is name.endswith("/") for own in found)


def test_one_process_gets_all_of_a_group():
    pytest.importorskip("xdist", reason="several processes need pytest-xdist")
    tests = [f"{name}{rest}" for name in TOGETHER for rest in ("a::b", "a::c[1]", "::C::d")]
    tests = [*tests[::2], *(f"tests/test_{n}.py::e" for n in range(4)), *tests[1::2]]
    option = SimpleNamespace(loadscopereorder=True)
    config = SimpleNamespace(option=option, getvalue=lambda _: ["2*popen"])
    scheduler = pytest_xdist_make_scheduler(config, None)
    processes = [Process("one"), Process("other")]
    for process in processes:
        scheduler.add_node(process)
    for process in processes:
        scheduler.add_node_collection(process, tests)
    scheduler.schedule()
    done = dict.fromkeys(processes, 0)
    while waiting := [p for p in processes if done[p] < len(p.told)]:
        for process in waiting:
            scheduler.mark_test_complete(process, process.told[done[process]])
            done[process] += 1
    found = [{tests[index] for index in process.told} for process in processes]
    assert sorted([*found[0], *found[1]]) == sorted(tests)
    for name in TOGETHER:
        group = {test for test in tests if next(filter(test.startswith, TOGETHER), None) == name}
        assert group
        assert group <= found[0] or group <= found[1], name
