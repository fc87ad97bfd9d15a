"""Numbers that stand in Rust and in Python: both say the same."""

from __future__ import annotations

import pytest

from qwenlora import ComposeOptions, _core
from qwenlora.packing import layout


@pytest.mark.parametrize("name", ["MAX_RANK", "MODULATION_PLANES", "RANK_MULTIPLE", "TILE"])
def test_layouts_have_the_same_numbers(name):
    assert getattr(layout, name) == getattr(_core, name)


def test_the_default_of_truncated_rank_is_the_planners():
    assert ComposeOptions().truncated_rank == _core.TRUNCATED_RANK
