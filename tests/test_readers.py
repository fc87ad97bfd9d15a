"""Files into buffers while Python does something else: `_core.Readers` and `staging.Loader`."""

from __future__ import annotations

import _thread
import gc
import math
import os
import re
import signal
import sys
import threading
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qwenlora
from qwenlora import ComposeOptions, LoraSet, Placement, _core, errors
from qwenlora.group.group import Group, Located, Member, Share
from qwenlora.group.load import loads_of
from qwenlora.group.loader import Loader
from qwenlora.packing.layout import LowRankSide
from qwenlora.source.dtypes import DTYPES, NAMES

from . import faults

BEFORE = 0xAA
"""What a buffer holds before it is filled."""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


def buffer_of(size):
    return np.full(size, BEFORE, dtype=np.uint8)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file of random bytes, which no test writes to: its path, and what it holds."""
    content = np.random.default_rng(1).integers(0, 256, 20_000_003, dtype=np.uint8)
    content.setflags(write=False)
    path = tmp_path_factory.mktemp("readers") / "lora.safetensors"
    content.tofile(path)
    return path, content


@pytest.fixture
def reader(file):
    opened = _core.TensorReader(file[0])
    yield opened
    opened.close()


@pytest.fixture(params=[1, 2, 16])
def readers(request):
    begun = _core.Readers(threads=request.param)
    yield begun
    begun.close()


SLOW = 300_000
"""Bytes that are read one by one: threads that have so many to read take a while."""


def read_slowly(readers, reader):
    """A reading of every second byte, and its buffer."""
    dest = buffer_of(SLOW)
    return readers.read(reader, [(range(0, 2 * SLOW, 2), 1, 0)], dest), dest


def assert_no_thread_is_left():
    """No thread of ours is alive, neither one of Python's nor one of Rust's."""
    # One that was joined may be listed for a moment.
    until = time.monotonic() + 10
    while _our_threads() and time.monotonic() < until:
        time.sleep(0.001)
    assert _our_threads() == []


def _our_threads():
    names = [thread.name for thread in threading.enumerate()]
    for task in Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(task.read_text().strip())
        except OSError:
            # It has ended meanwhile.
            continue
    unnamed = _unnamed_threads() - RUNNERS_THREADS
    return [name for name in names if name.startswith("qwenlora")] + ["unnamed"] * unnamed


def _unnamed_threads():
    """How many there are that `threading` knows nothing of; it knows the main thread, too."""
    return _thread._count() - (threading.active_count() - 1)


RUNNERS_THREADS = _unnamed_threads()
"""A process of pytest-xdist listens to the first one in such a thread."""


@pytest.fixture
def interrupt():
    """Interrupts the main thread when it is called, as Ctrl-C does."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "win32":
        yield _thread.interrupt_main
    else:
        yield partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT)
    signal.signal(signal.SIGINT, kept)


# ---- Readers ----


def test_runs_of_several_blocks(file, reader, readers):
    _, content = file
    rng = np.random.default_rng(2)
    runs, pairs, end = [], [], 40
    for size in (300, 1, 9_000_001, 0, 5_000):
        offsets = rng.integers(0, len(content) - size, 3).tolist()
        runs.append((offsets, size, end))
        pairs += [(offset, size, end + at * size) for at, offset in enumerate(offsets)]
        end += 3 * size + 11
    dest, wanted = buffer_of(end), buffer_of(end)
    for offset, size, begin in pairs:
        wanted[begin : begin + size] = content[offset : offset + size]
    reading = readers.read(reader, runs, dest)
    reading.wait()
    assert np.array_equal(dest, wanted)
    # Once it is filled, it stays so.
    reading.wait()
    at_once = buffer_of(end)
    reader.read_into(pairs, at_once, threads=2)
    assert np.array_equal(at_once, wanted)


def test_readings_of_several_files_at_once(file, reader, readers, tmp_path):
    _, content = file
    other_content = content[::-1].copy()
    other_content.tofile(tmp_path / "other")
    other = _core.TensorReader(tmp_path / "other")
    begun = []
    for turn in range(12):
        source, own = [(reader, content), (other, other_content)][turn % 2]
        size = 1_000_000 + turn
        dest = buffer_of(size)
        begun.append((readers.read(source, [([turn], size, 0)], dest), dest, own[turn:][:size]))
    for reading, dest, wanted in reversed(begun):
        reading.wait()
        assert np.array_equal(dest, wanted)
    other.close()


def test_nothing_to_read(reader, readers):
    for runs in ([], [([], 5, 0)], [([0, 1], 0, 3)]):
        dest = buffer_of(3)
        readers.read(reader, runs, dest).wait()
        assert dest.tolist() == [BEFORE] * 3


def test_an_array_may_be_part_of_another(file, reader, readers):
    whole, wanted = buffer_of(300), buffer_of(300)
    wanted[100:200] = file[1][5:105]
    readers.read(reader, [([5], 100, 0)], whole[100:200]).wait()
    assert np.array_equal(whole, wanted)


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
def test_what_is_read_is_measured(name, reader, readers, tmp_path):
    values = torch.randn(3_000_000).to(DTYPES[name])
    values[2_999_999] = -77
    values.view(torch.uint8).numpy().tofile(tmp_path / "values")
    own = _core.TensorReader(tmp_path / "values")
    size = values.nbytes
    dest = buffer_of(size)
    assert readers.read(own, [([0], size, 0)], dest).wait() is None
    assert readers.read(own, [([0], size, 0)], dest, measure=name).wait() == 77
    assert np.array_equal(dest, values.view(torch.uint8).numpy())
    part = size // 2
    assert (
        readers.read(own, [([0], part, 0)], dest, measure=name).wait()
        == values[: len(values) // 2].abs().max().item()
    )
    with pytest.raises(errors.LoraReadError, match=f"no whole values of {name}"):
        readers.read(own, [([0], part + 1, 0)], dest, measure=name)
    with pytest.raises(ValueError, match="only F16, BF16 and F32 are measured, got I8"):
        readers.read(own, [([0], part, 0)], dest, measure="I8")
    own.close()


def _read_only():
    dest = buffer_of(9)
    dest.flags.writeable = False
    return dest


@pytest.mark.parametrize(
    ("dest", "error", "words"),
    [
        (_read_only(), ValueError, "cannot be written"),
        (buffer_of(18)[::2], ValueError, "contiguous in C order"),
        (buffer_of(9)[::-1], ValueError, "contiguous in C order"),
        (buffer_of(9).view(np.int8), TypeError, None),
        (bytearray([BEFORE] * 9), TypeError, None),
    ],
    ids=["read-only", "with gaps", "backwards", "other dtype", "no array"],
)
def test_what_cannot_be_filled(dest, error, words, reader, readers):
    with pytest.raises(error, match=words):
        readers.read(reader, [([0], 9, 0)], dest)
    assert np.asarray(dest).tobytes() == bytes([BEFORE] * 9)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (([0, 20_000_000], 4, 0), "beyond the file"),
        (([0, 20_000_003], 1, 0), "beyond the file"),
        (([0, (1 << 64) - 1], 1, 0), "beyond the file"),
        (([0, 1], 10_000, 1), "beyond the destination"),
        (([0], 1, 1 << 63), "beyond the destination"),
        (([0, 50], 10, 19_990), "beyond the destination"),
        (([0, 50], 10, 19_980), "overlap"),
    ],
)
def test_ranges_that_do_not_fit(run, words, file, reader, readers):
    dest = buffer_of(20_000)
    with pytest.raises(errors.LoraReadError, match=words) as caught:
        readers.read(reader, [([0], 5, 19_995), run], dest)
    assert str(file[0]) in str(caught.value)
    # Had anything been begun, it would be done when the next one is.
    readers.read(reader, [([0], 5, 0)], buffer_of(5)).wait()
    assert np.array_equal(dest, buffer_of(20_000))


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (([0, 0, 0], (1 << 64) - 1, 1), ValueError),
        (([-1], 1, 0), OverflowError),
        (([0], 1, -1), OverflowError),
        (([1 << 64], 1, 0), OverflowError),
        (([0.5], 1, 0), TypeError),
    ],
)
def test_numbers_that_are_no_places(run, error, reader, readers):
    with pytest.raises(error):
        readers.read(reader, [run], buffer_of(9))


@pytest.mark.parametrize("threads", [0, -1, None])
def test_there_is_at_least_one_thread(threads):
    with pytest.raises((ValueError, OverflowError, TypeError)):
        _core.Readers(threads=threads)


def test_closed_readers_read_no_more(reader, readers):
    readers.close()
    readers.close()
    dest = buffer_of(1)
    with pytest.raises(ValueError, match="the readers are closed"):
        readers.read(reader, [([0], 1, 0)], dest)
    assert dest == BEFORE


@pytest.mark.parametrize("threads", [1, 2])
def test_closing_ends_what_waits(threads, file, reader):
    path, content = file
    # A thread may be so late that all was read before: then once more.
    for _ in range(100):
        readers = _core.Readers(threads=threads)
        begun = [read_slowly(readers, reader) for _ in range(3)]
        readers.close()
        # Nothing writes to the buffers any more, whoever still knows them.
        kept = [dest.copy() for _, dest in begun]
        told = [error_of(reading) for reading, _ in begun]
        for error, own, (_, dest) in zip(told, kept, begun, strict=True):
            assert np.array_equal(own, dest)
            assert error or np.array_equal(dest, content[: 2 * SLOW : 2])
        if any(told):
            assert set(told) <= {"", f"`{path}`: reading was stopped"}
            return
    pytest.fail("nothing was stopped")


def error_of(reading):
    """What waiting for it raises; empty where it is filled."""
    try:
        reading.wait()
    except errors.LoraReadError as error:
        return str(error)
    return ""


@linux_only
def test_closed_readers_leave_no_thread(reader):
    readers = _core.Readers(threads=3)
    read_slowly(readers, reader)[0].wait()
    assert len([name for name in _our_threads() if name == "qwenlora-read"]) == 3
    readers.close()
    assert_no_thread_is_left()
    # And so where nobody closes them.
    readers = _core.Readers(threads=3)
    reading, _ = read_slowly(readers, reader)
    del readers
    assert_no_thread_is_left()
    del reading


def test_threads_that_read_and_close_at_once(file, reader):
    """Whoever comes late is told; nobody waits forever."""
    path, content = file
    for _ in range(30):
        readers, told = _core.Readers(threads=2), []

        def work(readers=readers, told=told):
            try:
                while True:
                    dest = buffer_of(1_000)
                    with pytest.raises(errors.LoraReadError, match="beyond"):
                        readers.read(reader, [([0], 2_000, 0)], dest)
                    reading = readers.read(reader, [([3], 1_000, 0)], dest)
                    reading.wait()
                    assert np.array_equal(dest, content[3:1_003])
            except (ValueError, errors.LoraReadError) as error:
                told.append(str(error))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.002)
        closing = [threading.Thread(target=readers.close) for _ in range(2)]
        for thread in closing:
            thread.start()
        for thread in threads + closing:
            thread.join(60)
            assert not thread.is_alive()
        allowed = ("the readers are closed", f"`{path}`: reading was stopped")
        assert len(told) == 4
        assert set(told) <= set(allowed)


@pytest.mark.slow
def test_a_buffer_lives_while_it_is_read(file, reader, readers):
    reading, dest = read_slowly(readers, reader)
    alive = weakref.ref(dest)
    del dest
    gc.collect()
    assert alive() is not None
    reading.wait()
    assert np.array_equal(alive(), file[1][: 2 * SLOW : 2])
    del reading
    gc.collect()
    assert alive() is None


@pytest.mark.slow
def test_nothing_writes_where_a_reading_was_let_go(file, reader, readers):
    size = 20_000_003
    for _ in range(3):
        dest = buffer_of(size)
        reading = readers.read(reader, [([0], size, 0)], dest)
        del reading
        dest[:] = 0x55
        later, buffer = read_slowly(readers, reader)
        later.wait()
        assert (dest == 0x55).all()
        assert np.array_equal(buffer, file[1][: 2 * SLOW : 2])


def test_a_closed_file_is_read_to_its_end(file, readers):
    path, content = file
    reader = _core.TensorReader(path)
    reading, dest = read_slowly(readers, reader)
    reader.close()
    with pytest.raises(ValueError, match="the reader is closed"):
        readers.read(reader, [([0], 1, 0)], buffer_of(1))
    reading.wait()
    assert np.array_equal(dest, content[: 2 * SLOW : 2])
    assert open_files(path) == 0


def open_files(path):
    """How often this process has a file open, where the system tells."""
    found = 0
    for link in Path("/proc/self/fd").glob("*"):
        try:
            found += os.readlink(link) == str(path)
        except OSError:
            continue
    return found


def test_a_file_cut_short(file, readers, tmp_path):
    other, content = file
    path = tmp_path / "cut"
    content.tofile(path)
    reader, whole = _core.TensorReader(path), _core.TensorReader(other)
    os.truncate(path, 1_000)
    dests = [buffer_of(900) for _ in range(4)]
    begun = [
        readers.read(whole, [([0], 900, 0)], dests[0]),
        readers.read(reader, [([500], 900, 0)], dests[1]),
        readers.read(reader, [([100], 900, 0)], dests[2]),
        readers.read(whole, [([500], 900, 0)], dests[3]),
    ]
    with pytest.raises(errors.LoraReadError, match="ended at byte 1000 ") as caught:
        begun[1].wait()
    assert str(path) in str(caught.value)
    # It is told once; the buffer does not count as filled for that.
    with pytest.raises(errors.LoraReadError, match="reading was stopped"):
        begun[1].wait()
    for at, offset in ((0, 0), (2, 100), (3, 500)):
        begun[at].wait()
        assert np.array_equal(dests[at], content[offset : offset + 900])
    reader.close()
    whole.close()
    assert open_files(path) == open_files(other) == 0


def test_a_wait_can_be_interrupted(file, reader, interrupt):
    _, content = file
    # A thread may be so late that all was read before: then once more.
    for _ in range(20):
        readers = _core.Readers(threads=1)
        begun = [read_slowly(readers, reader) for _ in range(3)]
        reading, dest = begun[-1]
        timer = threading.Timer(0.01, interrupt)
        waited = False
        try:
            timer.start()
            reading.wait()
            waited = True
            timer.join()
            time.sleep(10)
        except KeyboardInterrupt:
            timer.join()
        reading.wait()
        readers.close()
        assert np.array_equal(dest, content[: 2 * SLOW : 2])
        if not waited:
            return
    pytest.fail("no wait was interrupted")


def test_a_reading_that_is_interrupted_and_let_go_writes_nothing_more(file, reader, interrupt):
    _, content = file
    # A thread may be so late that all was read before: then once more.
    for _ in range(20):
        readers = _core.Readers(threads=1)
        begun = [read_slowly(readers, reader) for _ in range(4)]
        reading, dest = begun.pop()
        timer = threading.Timer(0.01, interrupt)
        try:
            timer.start()
            reading.wait()
            timer.join()
            time.sleep(10)
        except KeyboardInterrupt:
            timer.join()
        del reading
        is_untouched = (dest == BEFORE).all()
        dest[:] = 0x55
        # Those before it go on, and so does what comes later.
        begun.append(read_slowly(readers, reader))
        for other, buffer in begun:
            other.wait()
            assert np.array_equal(buffer, content[: 2 * SLOW : 2])
        readers.close()
        assert (dest == 0x55).all()
        if is_untouched:
            return
    pytest.fail("no wait was interrupted before its turn came")


# ---- Loader ----

RANKS = (4, 6)
FEATURES = ROWS = 32
SLOTS = 7


class Source:
    """A LoRA that counts what is asked of it, and may fail or wait."""

    identity = "a LoRA"

    def __init__(self, path, *, cacheable):
        self.cacheable = cacheable
        self.reader = _core.TensorReader(path)
        self.content = np.fromfile(path, dtype=np.uint8)
        self.begun = 0
        self.before = lambda turn: None
        self._lock = threading.Lock()

    def read_into(self, runs, buffer, readers, *, measure):
        with self._lock:
            turn, self.begun = self.begun, self.begun + 1
        self.before(turn)
        own = [(run.offsets, run.nbytes, run.begin) for run in runs]
        return readers.read(self.reader, own, buffer.numpy(), measure=measure and NAMES[measure])


@pytest.fixture(params=[True, False], ids=["file", "in memory"])
def source(request, tmp_path):
    """Two modules of a LoRA in some slots."""
    path = tmp_path / "loads"
    count = SLOTS * sum(RANKS) * (FEATURES + ROWS)
    torch.randn(count, generator=torch.Generator().manual_seed(1)).numpy().tofile(path)
    made = Source(path, cacheable=request.param)
    yield made
    made.reader.close()


@pytest.fixture(params=["cpu", "cuda"])
def loads(request):
    """One load for each slot; nothing is brought to the device that they are for."""
    members, end = [], 0
    for rank in RANKS:
        tensors = {}
        for side, size in ((LowRankSide.DOWN, FEATURES), (LowRankSide.UP, ROWS)):
            nbytes = 4 * rank * size
            offsets = [end + nbytes * slot for slot in range(SLOTS)]
            tensors[side] = Located(nbytes, offsets, range(SLOTS))
            end += nbytes * SLOTS
        members.append(Member(rank, 1.0, 0, ROWS, torch.float32, FEATURES, tensors))
    device = torch.device(request.param)
    targets = tuple(SimpleNamespace(device=device) for _ in range(SLOTS))
    found = loads_of(Group(targets, (Share(0, tuple(members)),)), 1)
    assert [list(load.slots) for load in found] == [[slot] for slot in range(SLOTS)]
    return found


@pytest.fixture
def loader(loads, source):
    """Reads the loads; whatever a test did to it, nothing of it is left when it is closed."""
    made = Loader(loads, [source], [source], threads=2, pinned=False)
    yield made
    made.close()
    made.close()
    assert_no_thread_is_left()


def take(loader, load, source):
    """The load, which holds what the file does."""
    staged = loader.take(load)
    (slot,) = load.slots
    for block in load.blocks:
        own = load.share.members[block.member].tensors[block.side]
        begin = own.offsets[slot]
        found = staged.bytes[block.begin : block.begin + block.nbytes].numpy()
        assert np.array_equal(found, source.content[begin : begin + own.len_bytes])
    return staged


def take_all(loader, loads, source, *, is_released=False):
    for load in loads:
        staged = take(loader, load, source)
        if is_released:
            loader.release(load, staged, None, keep_bytes=0)


class Copying:
    """A copy out of a buffer; one that is not done is done when somebody has waited for it."""

    def __init__(self, *, is_done):
        self.is_done = is_done

    def query(self):
        return self.is_done

    def synchronize(self):
        self.is_done = True


@pytest.fixture
def host_buffers(monkeypatch):
    """Counts the buffers that are made; with `fails_at`, that one is not."""
    counted = SimpleNamespace(made=0, fails_at=None)
    lock = threading.Lock()

    def count_or_raise():
        with lock:
            at, counted.made = counted.made, counted.made + 1
        if at == counted.fails_at:
            raise MemoryError("injected")

    faults.replace(monkeypatch, [faults.HOST_BUFFER], faults.before(count_or_raise))
    return counted


@pytest.mark.parametrize("copied", [None, True, False])
def test_buffers_are_used_again_when_they_are_free(copied, loader, loads, source, host_buffers):
    loader.begin()
    copies = []
    for load in loads:
        staged = take(loader, load, source)
        copies.append(Copying(is_done=copied) if copied is not None else None)
        loader.release(load, staged, copies[-1], keep_bytes=0)
    assert source.begun == len(loads)
    # Those of the loads that are begun at once, and of the one that is used meanwhile.
    assert host_buffers.made <= 4
    loader.close()
    assert all(copy is None or copy.is_done for copy in copies)


def test_loads_that_are_kept_are_not_read_again(loader, loads, source, host_buffers):
    for load in loads:
        loader.release(load, take(loader, load, source), None, keep_bytes=1 << 30)
    again = Loader(loads, [source], [source], threads=None, pinned=False)
    again.begin()
    for load in loads:
        take(again, load, source)
    again.close()
    assert source.begun == (1 if source.cacheable else 2) * len(loads)
    assert host_buffers.made <= source.begun


def test_loads_are_taken_in_their_order(loader, loads, source):
    take(loader, loads[0], source)
    with pytest.raises(RuntimeError, match="in the order"):
        loader.take(loads[2])


@pytest.mark.parametrize("taken", [0, 1, SLOTS])
def test_a_loader_may_be_closed_at_any_time(taken, loader, loads, source):
    loader.begin()
    for load in loads[:taken]:
        take(loader, load, source)


@pytest.mark.parametrize("call", range(SLOTS))
def test_an_error_while_a_buffer_is_made(call, loader, loads, source, host_buffers):
    host_buffers.fails_at = call
    loader.begin()
    # Nothing is released: each load takes a buffer of its own.
    with pytest.raises(MemoryError, match="injected"):
        take_all(loader, loads, source)


@pytest.mark.parametrize("is_released", [True, False])
@pytest.mark.parametrize("turn", range(SLOTS))
def test_an_error_while_reading_is_begun(turn, is_released, loader, loads, source):
    def failing(at):
        if at == turn:
            raise RuntimeError("injected")

    source.before = failing
    with pytest.raises(RuntimeError, match="injected"):
        take_all(loader, loads, source, is_released=is_released)


@pytest.mark.parametrize("turn", range(SLOTS))
def test_a_file_cut_short_between_loads(turn, loader, loads, source, tmp_path):
    def cutting(at):
        if at == turn:
            os.truncate(tmp_path / "loads", 1_000)

    source.before = cutting
    with pytest.raises(errors.LoraReadError, match="ended at byte"):
        take_all(loader, loads, source)


class StuckReaders:
    """Read nothing until they are closed."""

    def __init__(self, *, threads):
        self.closed = threading.Event()
        self.waited_for = threading.Event()

    def read(self, file, runs, dest, *, measure):
        return self

    def wait(self):
        self.waited_for.set()
        while not self.closed.wait(0.01):
            pass
        raise errors.LoraReadError("reading was stopped")

    def close(self):
        self.closed.set()


cannot_be_interrupted = pytest.mark.skipif(
    sys.platform == "win32", reason="there a wait for another thread hears no interrupt"
)


@cannot_be_interrupted
def test_an_interrupt_ends_a_take(loader, loads, monkeypatch, interrupt):
    monkeypatch.setattr(_core, "Readers", StuckReaders)
    loader.begin()
    timer = threading.Timer(0.05, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        loader.take(loads[0])
    timer.join()
    # Closing waits for no reading that would only end later.


# ---- compositions ----

FEW_SLOTS = ComposeOptions(staging_bytes=1 << 15, cache_bytes=0)
"""Many loads, of which some are read while others are used."""


@pytest.fixture
def scene(make_model, Draft, probe, tmp_path):
    """A model with one LoRA in it, the files of two others, and what its base is."""
    model = make_model(num_layers=3)
    base = probe.snapshot(model)
    paths = [
        Draft.full(seed, rank=8, blocks=3).save(tmp_path / f"{seed}.safetensors")
        for seed in range(3)
    ]
    qwenlora.compose_loras(model, paths[0])
    report, before = qwenlora.applied(model), probe.snapshot(model)

    def assert_as_it_was():
        assert probe.snapshot(model).differences(before) == []
        assert qwenlora.applied(model) is report

    def assert_base():
        assert probe.snapshot(model).tensors == base.tensors
        assert qwenlora.applied(model).failure is not None

    return SimpleNamespace(
        model=model, paths=paths[1:], assert_as_it_was=assert_as_it_was, assert_base=assert_base
    )


@pytest.fixture
def readings(monkeypatch):
    """Counts the readings that begin; calls `before`, where it is set, with each one's number."""
    counted = SimpleNamespace(begun=0, before=lambda turn: None)
    real, lock = _core.Readers, threading.Lock()

    class Watched:
        def __init__(self, *, threads):
            self._readers = real(threads=threads)
            self.close = self._readers.close

        def read(self, file, runs, dest, *, measure):
            with lock:
                turn, counted.begun = counted.begun, counted.begun + 1
            counted.before(turn)
            return self._readers.read(file, runs, dest, measure=measure)

    monkeypatch.setattr(_core, "Readers", Watched)
    return counted


@pytest.mark.slow
@pytest.mark.parametrize("place", [Placement.WHOLE, Placement.BY_PATH])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("file", [0, 1], ids=["the first file", "the second file"])
def test_a_file_cut_short_while_others_are_read(
    file, share, place, scene, readings, make_model, probe
):
    options = replace(FEW_SLOTS, placement=place)
    fresh = make_model(num_layers=3)
    qwenlora.compose_loras(fresh, scene.paths, options=options)
    last, readings.begun = readings.begun - 1, 0
    assert last > 50
    path = scene.paths[file]
    whole = path.read_bytes()

    def cutting(turn):
        if turn == round(share * last):
            os.truncate(path, len(whole) // 2)

    readings.before = cutting
    with pytest.raises(errors.LoraReadError, match=re.escape(str(path))) as caught:
        qwenlora.compose_loras(scene.model, scene.paths, options=options)
    assert re.search("ended at byte|changed", str(caught.value))
    if place is Placement.WHOLE:
        scene.assert_as_it_was()
    else:
        scene.assert_base()
    assert_no_thread_is_left()
    # The error, and what it went through, keeps no file open.
    assert [open_files(own) for own in scene.paths] == [0, 0]

    path.write_bytes(whole)
    readings.before = lambda turn: None
    qwenlora.compose_loras(scene.model, scene.paths, options=options)
    assert probe.snapshot(scene.model).tensors == probe.snapshot(fresh).tensors


@cannot_be_interrupted
def test_a_composition_that_waits_can_be_interrupted(scene, monkeypatch, interrupt):
    with monkeypatch.context() as patch:
        patch.setattr(_core, "Readers", StuckReaders)
        timer = threading.Timer(0.2, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            qwenlora.compose_loras(scene.model, scene.paths)
        timer.join()
    scene.assert_as_it_was()
    assert_no_thread_is_left()
    assert qwenlora.compose_loras(scene.model, scene.paths).complete


@pytest.mark.parametrize("options", [ComposeOptions(), FEW_SLOTS], ids=["large", "small"])
def test_no_thread_outlives_a_composition(options, scene):
    qwenlora.compose_loras(scene.model, scene.paths, options=options)
    assert_no_thread_is_left()
    qwenlora.compose_loras(scene.model, [(scene.paths[0], 0.5)], options=options)
    assert_no_thread_is_left()
    tensors = load_file(scene.paths[1])
    qwenlora.compose_loras(scene.model, [scene.paths[0], tensors], options=options)
    qwenlora.reset_loras(scene.model)
    assert_no_thread_is_left()


def _raise_memory_error(*_args, **_options):
    raise MemoryError("injected")


def _raise_no_thread(*_args, **_options):
    raise RuntimeError("can't start new thread: injected")


@pytest.mark.parametrize(
    ("point", "failing", "error"),
    [
        (faults.BUILD, _raise_memory_error, MemoryError),
        (faults.PLACER, _raise_memory_error, MemoryError),
        (faults.HOST_BUFFER, _raise_memory_error, MemoryError),
        (faults.LOOK, _raise_memory_error, MemoryError),
        (faults.SUBMIT, _raise_no_thread, RuntimeError),
        ((_core, "Readers"), _raise_no_thread, RuntimeError),
    ],
)
def test_no_thread_outlives_an_error(point, failing, error, scene, monkeypatch):
    # Planned before, so that nothing but reading tensors needs a thread.
    plans = [qwenlora.LoraSpec(path) for path in scene.paths]
    LoraSet.of(plans)
    faults.replace(monkeypatch, [point], faults.instead(failing))
    with pytest.raises(error, match="injected") as caught:
        qwenlora.compose_loras(scene.model, plans, options=FEW_SLOTS)
    assert_no_thread_is_left()
    assert [open_files(own) for own in scene.paths] == [0, 0]
    scene.assert_as_it_was()
    del caught


def test_no_thread_outlives_a_delta_that_is_not_finite(scene):
    tensors = load_file(scene.paths[0])
    tensors["transformer.proj_out.lora_A.weight"][0, 0] = math.nan
    save_file(tensors, scene.paths[0])
    with pytest.raises(errors.NonFiniteError, match="proj_out"):
        qwenlora.compose_loras(scene.model, scene.paths, options=FEW_SLOTS)
    scene.assert_as_it_was()
    assert_no_thread_is_left()
