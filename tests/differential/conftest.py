"""Options of the differential fuzz; `make differential` gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("differential fuzz")
    group.addoption("--seconds", type=float, help="How long to go through seeds.")
    group.addoption("--first-seed", type=int, default=10_000, help="The seed to begin with.")
    group.addoption("--seed", type=int, help="The one seed to run.")
