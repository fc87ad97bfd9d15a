"""What is kept between compositions, and files that change meanwhile."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch

import qwenlora
from qwenlora import ComposeOptions, _core, cache, errors
from qwenlora.group.load import Staged

EXACT = 2e-6
"""Relative error of float32 tensors against float64 formulas."""

BLOCK = "transformer_blocks.0"


def test_a_change_of_strength_reads_no_file(model, lora, probe, reads):
    path, draft = lora
    qwenlora.compose_loras(model, path)
    read = (reads.plans, reads.tensors)
    assert read == (1, len(draft.tensors))
    qwenlora.compose_loras(model, (path, 0.5))
    qwenlora.compose_loras(model, [])
    qwenlora.compose_loras(model, [(path, -2.0), (path, 1.0)])
    assert (reads.plans, reads.tensors) == read
    probe.assert_holds(model, [(draft, -1.0)], within=EXACT)
    assert reads.open == 0


def test_within_one_composition_nothing_is_read_twice(model, lora, reads):
    qwenlora.compose_loras(model, lora[0], options=ComposeOptions(cache_bytes=0))
    assert reads.tensors == len(lora[1].tensors)


def test_cache_bytes_0_keeps_nothing(model, lora, probe, reads):
    options = ComposeOptions(cache_bytes=0)
    qwenlora.compose_loras(model, lora[0], options=options)
    assert cache.pieces.nbytes == 0
    qwenlora.compose_loras(model, (lora[0], 0.5), options=options)
    assert reads.tensors == 2 * len(lora[1].tensors)
    probe.assert_holds(model, [(lora[1], 0.5)], within=EXACT)


def test_clear_cache_reads_again_and_leaves_the_model(model, lora, probe, reads):
    qwenlora.compose_loras(model, lora[0])
    before = probe.snapshot(model)
    assert cache.pieces.nbytes > 0
    qwenlora.clear_cache()
    assert cache.pieces.nbytes == 0
    assert probe.snapshot(model).differences(before) == []
    qwenlora.compose_loras(model, (lora[0], 0.5))
    assert reads.plans == 2
    assert reads.tensors == 2 * len(lora[1].tensors)


@pytest.mark.parametrize("limit_bytes", [10_000, 40_000, 1 << 30])
def test_the_cache_holds_no_more_memory_than_it_may(limit_bytes, model, lora):
    qwenlora.compose_loras(model, lora[0], options=ComposeOptions(cache_bytes=limit_bytes))
    storages = {}
    for own in cache.pieces.values():
        for tensor in [own.bytes] if isinstance(own, Staged) else [*own.downs, *own.ups]:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    held = sum(storages.values())
    # What the cache says it holds is what it keeps alive.
    assert 0 < held <= cache.pieces.nbytes <= limit_bytes


def test_a_dropped_model_is_let_go(make_model, lora):
    model = make_model()
    qwenlora.compose_loras(model, lora[0])
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_an_edited_file_is_composed_again(model, lora, probe, Draft):
    path, draft = lora
    first = qwenlora.compose_loras(model, path)
    edited = Draft.full(seed=77, rank=4).save(path)
    later = edited.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))
    assert qwenlora.compose_loras(model, path) is not first
    probe.assert_holds(model, [(Draft.full(seed=77, rank=4), 1.0)], within=EXACT)
    assert not torch.equal(probe.delta(model, "proj_out"), draft.slot_delta("proj_out", (64, 128)))


@pytest.mark.parametrize("moment", ["before reading", "while reading"])
@pytest.mark.parametrize("previous", [False, True])
def test_a_file_that_changes_meanwhile(
    moment, previous, model, lora, probe, Draft, tmp_path, monkeypatch
):
    path, _ = lora
    if previous:
        qwenlora.compose_loras(model, Draft.full(seed=9).save(tmp_path / "previous.safetensors"))
    before, addresses = probe.snapshot(model), probe.addresses(model)
    reader, readers = _core.TensorReader, _core.Readers

    def changed():
        os.utime(path, ns=(1, 1))

    class ChangingReader:
        def __init__(self, name):
            if moment == "before reading":
                changed()
            self._reader = reader(name)

        def __getattr__(self, name):
            return getattr(self._reader, name)

        def read_into(self, ranges, dest, *, threads):
            changed()
            return self._reader.read_into(ranges, dest, threads=threads)

    class ChangingReaders:
        def __init__(self, *, threads):
            self._readers = readers(threads=threads)
            self.close = self._readers.close

        def read(self, file, runs, dest, *, measure):
            changed()
            return self._readers.read(file._reader, runs, dest, measure=measure)

    monkeypatch.setattr(_core, "TensorReader", ChangingReader)
    monkeypatch.setattr(_core, "Readers", ChangingReaders)
    with pytest.raises(errors.LoraReadError, match="changed") as caught:
        qwenlora.compose_loras(model, path)
    assert isinstance(caught.value, OSError)
    assert probe.snapshot(model).differences(before) == []
    assert probe.addresses(model) == addresses
    monkeypatch.undo()
    qwenlora.compose_loras(model, path)
    probe.assert_holds(model, [(lora[1], 1.0)], within=EXACT)


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_file_cut_short_after_planning(is_cached, model, lora, probe, reads):
    path, _ = lora
    qwenlora.compose_loras(model, path)
    before = probe.snapshot(model)
    if not is_cached:
        cache.pieces.clear()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)
    with pytest.raises(errors.LoraFileError):
        qwenlora.compose_loras(model, (path, 0.5))
    assert probe.snapshot(model).differences(before) == []
    assert reads.open == 0


def test_no_file_stays_open_after_an_error(model, lora, reads):
    is_open = []

    def progress(*_):
        is_open.append(reads.open)
        raise MemoryError

    with pytest.raises(MemoryError):
        qwenlora.compose_loras(model, lora[0], options=ComposeOptions(progress=progress))
    assert is_open == [1]
    assert reads.open == 0


def test_no_file_stays_open_where_another_cannot_be_opened(model, lora, Draft, tmp_path, reads):
    second = Draft.full(seed=2).save(tmp_path / "second.safetensors")
    opened = _core.TensorReader.__init__

    def open_first(self, path):
        if path == second:
            raise errors.LoraReadError("gone")
        opened(self, path)

    _core.TensorReader.__init__ = open_first
    with pytest.raises(errors.LoraReadError, match="gone"):
        qwenlora.compose_loras(model, [lora[0], second])
    assert reads.open == 0


@pytest.mark.parametrize("strengths", [(1.0, 0.5), (0.7, 0.7)])
def test_what_comes_from_the_cache_is_not_read_into(strengths, make_model, probe, Draft, tmp_path):
    """One file twice, of whose kept deltas this composition may keep none."""
    model, draft = make_model(num_layers=12), Draft(1)
    for block in range(12):
        draft.add(f"transformer_blocks.{block}.attn.to_out.0", 16)
    path = draft.save(tmp_path / "lora.safetensors")
    stack = [(path, strength) for strength in strengths]
    none_kept = ComposeOptions(cache_bytes=0, staging_bytes=1)
    fresh = make_model(num_layers=12)
    qwenlora.compose_loras(fresh, stack, options=none_kept)
    qwenlora.compose_loras(model, (path, 0.3), options=ComposeOptions(staging_bytes=1))
    qwenlora.compose_loras(model, stack, options=none_kept)
    assert probe.snapshot(model).differences(probe.snapshot(fresh)) == []
