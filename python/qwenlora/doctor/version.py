"""Version numbers, as far as comparing them needs."""

from __future__ import annotations

from qwenlora.requirements import release_of

__all__ = ["cuda_of", "local_of", "release_of"]


def local_of(version: str) -> str:
    """The part after the `+`: `cu128` of `2.9.1+cu128`; empty without one."""
    return version.partition("+")[2]


def cuda_of(version: str | None) -> int | None:
    """The major version of CUDA: 12 of `12.8`."""
    numbers = release_of(version or "")
    return numbers[0] if numbers else None
