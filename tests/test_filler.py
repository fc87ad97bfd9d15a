"""Recipes that are carried out on another thread: in order, their errors told once."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from qwenlora import filler
from qwenlora.filler import Filler

TILE_BYTES = 512
LONG = 60
"""Seconds that nothing here takes: a test that waits so long has failed."""


@pytest.fixture
def own():
    made = Filler(threads=2)
    yield made
    made.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("qwenlora-fill")]


@pytest.fixture
def gate(monkeypatch):
    """Holds every recipe until it is opened; notes which were begun."""
    opened, begun, real = threading.Event(), [], filler._core.fill_packed

    def held(recipes, *, threads):
        begun.append(recipes)
        assert opened.wait(LONG)
        real(recipes, threads=threads)

    monkeypatch.setattr(filler._core, "fill_packed", held)
    yield opened, begun
    opened.set()


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
    opened, begun = gate
    dests = [memory() for _ in range(3)]
    source = np.zeros(TILE_BYTES, dtype=np.uint8)
    assert own.begun() is None
    for dest in dests:
        own.fill(copying(dest, source))
    last = own.begun()
    assert not last.query()
    assert len(begun) <= 1
    # A fourth waits for the first.
    fourth = memory()
    thread = threading.Thread(target=own.fill, args=[copying(fourth, source)])
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    opened.set()
    thread.join(LONG)
    last.synchronize()
    assert last.query()
    own.wait()
    assert not any(place.any() for place in (*dests, fourth))


@pytest.mark.parametrize("how", ["wait", "fill"])
def test_an_error_is_told_to_whoever_comes_next(how, own):
    own.fill(wrong())
    copied = own.begun()
    # Whoever waits for a buffer only wants to know that nobody reads it any more.
    copied.synchronize()
    assert copied.query()
    with pytest.raises(ValueError, match="multiple of 16"):
        own.wait() if how == "wait" else own.fill(wrong())
    dest = memory()
    own.fill(copying(dest, np.zeros(TILE_BYTES, dtype=np.uint8)))
    own.wait()
    assert not dest.any()


def test_closing_waits_and_does_not_tell(gate):
    opened, _ = gate
    own, dest = Filler(threads=1), memory()
    own.fill(wrong())
    own.fill(copying(dest, np.zeros(TILE_BYTES, dtype=np.uint8)))
    closing = threading.Thread(target=own.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    opened.set()
    closing.join(LONG)
    assert not closing.is_alive()
    assert not dest.any()


def test_nothing_to_wait_for():
    own = Filler()
    own.wait()
    own.close()
