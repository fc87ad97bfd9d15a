"""Files that are brought into the system's memory while something else is done."""

from __future__ import annotations

import _thread
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qwenlora
from qwenlora import LoraSet, _core, cache
from qwenlora.group.load import Staged
from qwenlora.source import read_ahead
from qwenlora.source.read_ahead import ReadAhead

LONG = 60
"""Seconds that nothing here takes: a test that waits so long has failed."""


@pytest.fixture
def ahead():
    own = ReadAhead()
    yield own
    own.clear()
    assert own.wait(LONG)


@pytest.fixture
def files(tmp_path):
    """Files of 9 to 11 MB."""
    paths = []
    for turn in range(3):
        paths.append(tmp_path / f"{turn}.safetensors")
        save_file(
            {"a": torch.full((9_000_000 + turn * 1_000_000,), turn, dtype=torch.uint8)}, paths[-1]
        )
    return paths


class Parts:
    """What is read, part by part; `before` is called with each part's path and first byte."""

    def __init__(self):
        self.read = []
        self.before = lambda path, begin: None

    def of(self, path):
        return [(begin, length) for own, begin, length in self.read if own == path]


@pytest.fixture
def parts(monkeypatch):
    noted, real = Parts(), _core.TensorReader

    class Noting:
        def __init__(self, path):
            self._path, self._reader = Path(path), real(path)
            self.identity, self.close = self._reader.identity, self._reader.close

        def read_into(self, ranges, dest, *, threads):
            ((begin, length, _),) = ranges
            noted.before(self._path, begin)
            self._reader.read_into(ranges, dest, threads=threads)
            noted.read.append((self._path, begin, length))

    monkeypatch.setattr(read_ahead._core, "TensorReader", Noting)
    return noted


def whole(path):
    """The parts of a file that is read to its end."""
    size = path.stat().st_size
    part = 4 << 20
    return [(begin, min(part, size - begin)) for begin in range(0, size, part)]


def test_files_are_read_whole_one_after_the_other(ahead, files, parts):
    before = _thread._count()
    for path in files:
        ahead.add(path)
    assert ahead.wait(LONG)
    assert [own for own, *_ in parts.read] == [p for path in files for p in [path] * 3]
    for path in files:
        assert parts.of(path) == whole(path)
    # Whoever asks again after a while may need it again.
    ahead.add(files[0])
    assert ahead.wait(LONG)
    assert parts.of(files[0]) == 2 * whole(files[0])
    end = time.monotonic() + LONG
    while _thread._count() > before and time.monotonic() < end:
        time.sleep(0.001)
    assert _thread._count() <= before


class Gate:
    """Holds the thread that reads in front of one part."""

    def __init__(self, parts, path, begin):
        self._where = path, begin
        self.reached, self.open = threading.Event(), threading.Event()
        parts.before = self._wait

    def _wait(self, *where):
        if where == self._where:
            self.reached.set()
            assert self.open.wait(LONG)


@pytest.mark.parametrize("cancelled", [0, 1])
def test_a_file_that_is_cancelled_is_read_no_further(cancelled, ahead, files, parts):
    gate = Gate(parts, files[0], 4 << 20)
    for path in files:
        ahead.add(path)
    assert gate.reached.wait(LONG)
    ahead.cancel(files[cancelled])
    gate.open.set()
    assert ahead.wait(LONG)
    for turn, path in enumerate(files):
        expected = whole(path) if turn != cancelled else whole(path)[: 2 if turn == 0 else 0]
        assert parts.of(path) == expected


def test_what_is_asked_for_twice_is_read_once(ahead, files, parts):
    gate = Gate(parts, files[0], 4 << 20)
    ahead.add(files[0])
    assert gate.reached.wait(LONG)
    for path in (files[0], files[1], files[1], files[0]):
        ahead.add(path)
    gate.open.set()
    assert ahead.wait(LONG)
    assert parts.of(files[0]) == whole(files[0])
    assert parts.of(files[1]) == whole(files[1])


def test_clearing_ends_all(ahead, files, parts):
    gate = Gate(parts, files[0], 0)
    for path in files:
        ahead.add(path)
    assert gate.reached.wait(LONG)
    ahead.clear()
    assert not ahead.wait(0.01)
    gate.open.set()
    assert ahead.wait(LONG)
    assert [own for own, *_ in parts.read] == [files[0]]


def test_files_that_cannot_be_read_are_let_be(ahead, files, parts, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    gate = Gate(parts, files[0], 4 << 20)
    for path in (files[0], tmp_path / "gone", tmp_path / "folder", tmp_path / "empty", files[1]):
        ahead.add(path)
    assert gate.reached.wait(LONG)
    os.truncate(files[0], 5 << 20)
    gate.open.set()
    assert ahead.wait(LONG)
    assert parts.of(files[0]) == whole(files[1])[:1]
    assert parts.of(files[1]) == whole(files[1])


def test_an_unexpected_error_ends_the_thread_not_the_service(ahead, files, parts, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: told.append(args.exc_type))

    def failing(path, begin):
        if path == files[0]:
            raise MemoryError("injected")

    parts.before = failing
    ahead.add(files[0])
    assert ahead.wait(LONG)
    assert told == [MemoryError]
    ahead.add(files[1])
    assert ahead.wait(LONG)
    assert parts.of(files[1]) == whole(files[1])
    parts.before = lambda path, begin: None
    ahead.add(files[0])
    assert ahead.wait(LONG)
    assert parts.of(files[0]) == whole(files[0])


def test_without_a_thread_nothing_is_read(ahead, files, parts, monkeypatch):
    def failing(work, arguments):
        raise RuntimeError("can't start new thread: injected")

    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", failing)
        ahead.add(files[0])
        assert ahead.wait(0)
    ahead.add(files[1])
    assert ahead.wait(LONG)
    assert [own for own, *_ in parts.read] == 3 * [files[1]]


# ---- sets ----


@pytest.fixture
def loras(Draft, tmp_path):
    return [Draft.full(seed=seed).save(tmp_path / f"lora{seed}.safetensors") for seed in range(3)]


@pytest.fixture
def asked(monkeypatch):
    """Paths that are asked for ahead of their use, and those that are cancelled."""
    added, cancelled = [], []
    monkeypatch.setattr(read_ahead.files, "add", added.append)
    monkeypatch.setattr(read_ahead.files, "cancel", cancelled.append)
    return added, cancelled


def test_a_set_asks_for_its_files_within_a_limit(asked, loras, Draft):
    added, _ = asked
    wanted = LoraSet.of([loras[0], (Draft.full(seed=9).tensors, 1.0), (loras[1], 0.5), loras[2]])
    sizes = [path.stat().st_size for path in loras]
    wanted.read_ahead(limit_bytes=sum(sizes))
    assert added == loras
    added.clear()
    wanted.read_ahead(limit_bytes=sum(sizes), first=2)
    assert added == loras[1:]
    added.clear()
    wanted.read_ahead(limit_bytes=sum(sizes) - 1)
    assert added == loras[:2]
    added.clear()
    wanted.read_ahead(limit_bytes=0)
    assert added == []


def test_composing_takes_over(asked, loras, model):
    added, cancelled = asked
    wanted = LoraSet.of(loras[0])
    wanted.read_ahead(limit_bytes=1 << 30)
    assert (added, cancelled) == (loras[:1], [])
    qwenlora.compose_loras(model, loras[0])
    assert cancelled == loras[:1]
    # Its deltas are kept now: there is nothing to read for another strength.
    LoraSet.of((loras[0], 0.5)).read_ahead(limit_bytes=1 << 30)
    assert added == loras[:1]
    qwenlora.clear_cache()
    LoraSet.of((loras[0], 0.5)).read_ahead(limit_bytes=1 << 30)
    assert added == 2 * loras[:1]


@pytest.mark.parametrize(("share", "is_read"), [(0.3, True), (0.6, False)])
@pytest.mark.parametrize("where", ["pieces", "on_device"])
def test_what_is_kept_in_part_is_read(share, is_read, where, asked, loras):
    added, _ = asked
    wanted = LoraSet.of(loras[0])
    (source,) = wanted.sources
    key = (source.identity, "some load")
    staged = Staged(torch.empty(int(source.nbytes * share), dtype=torch.uint8), None)
    kept = getattr(cache, where)
    kept.put(key if where == "pieces" else (key, "a device"), staged, limit_bytes=1 << 30)
    wanted.read_ahead(limit_bytes=1 << 30)
    assert added == (loras[:1] if is_read else [])
    qwenlora.clear_cache()


def test_clearing_the_cache_ends_reading_ahead(files, parts):
    gate = Gate(parts, files[0], 0)
    read_ahead.files.add(files[0])
    read_ahead.files.add(files[1])
    assert gate.reached.wait(LONG)
    qwenlora.clear_cache()
    gate.open.set()
    assert read_ahead.files.wait(LONG)
    assert [own for own, *_ in parts.read] == [files[0]]


# ---- the system's memory ----


def in_memory(path, at):
    """Whether the system holds a byte of a file without having to ask the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(file, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(file)


@pytest.mark.skipif(sys.platform != "linux", reason="nobody tells what the system holds")
def test_what_is_read_ahead_is_in_memory(ahead, files):
    path = files[0]
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    places = range(0, path.stat().st_size, 1 << 20)
    try:
        if all(in_memory(path, at) for at in places):
            pytest.skip("this file system lets go of nothing")
    except OSError as error:
        pytest.skip(f"this file system does not tell: {error}")
    ahead.add(path)
    until = time.monotonic() + LONG
    assert ahead.wait(LONG)
    while not all(in_memory(path, at) for at in places):
        assert time.monotonic() < until
        time.sleep(0.01)
