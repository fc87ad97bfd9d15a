"""What installing the wheel changes in an environment: nothing but qwenlora itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .environment import Environment


def test_the_wheel_is_for_every_python_from_310_on(wheel: Path) -> None:
    assert wheel.name.startswith("qwenlora-0.1.0-cp310-abi3-")


def test_a_new_environment_is_empty(new_environment: Callable[[str], Environment]) -> None:
    assert new_environment("empty").packages() == set()
