"""The seam by which tests take the ways of large things with small ones."""

from __future__ import annotations

import threading

import pytest

from qwenlora import sizes
from qwenlora.sizes import Sizes, sized


def test_other_sizes_hold_until_their_context_ends():
    with sized(exact_side=8, panel_bytes=1):
        with sized(exact_side=4):
            assert sizes.current() == Sizes(exact_side=4, panel_bytes=1)
        assert sizes.current() == Sizes(exact_side=8, panel_bytes=1)
        with pytest.raises(KeyboardInterrupt), sized(batch_bytes=1):
            raise KeyboardInterrupt
        assert sizes.current() == Sizes(exact_side=8, panel_bytes=1)
    assert sizes.current() == Sizes()


def test_other_threads_see_them():
    seen = []
    with sized(formed_bytes=1):
        thread = threading.Thread(target=lambda: seen.append(sizes.current().formed_bytes))
        thread.start()
        thread.join()
    assert seen == [1]


def test_a_size_that_is_none_is_refused():
    with pytest.raises(TypeError, match="panel_byte"), sized(panel_byte=1):
        pytest.fail("entered")
    assert sizes.current() == Sizes()
