"""Requests and answers, as they travel between the deployments."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["Met", "Order", "Picture", "Refusal"]


@dataclass(frozen=True)
class Order:
    """A picture that is asked for, apart from its LoRAs. The same order gives the same picture.

    Attributes:
        prompt: The text.
        seed: Seed of the noise.
        steps: Sampling steps.
    """

    prompt: str
    seed: int
    steps: int


class Met(str, enum.Enum):
    """The state in which a request found its stack."""

    IN_PLACE = "in-place"
    """In the transformer, at these strengths: nothing was composed."""

    HELD = "held"
    """Held by the replica."""

    NEW = "new"
    """Not held: the files were planned and read."""


@dataclass(frozen=True)
class Picture:
    """A picture that was made.

    Attributes:
        png: The file's bytes.
        met: The state in which the stack was found.
        compose_s: Seconds that composing took.
        report: The report of the LoRAs in one line.
        kept_bytes: Bytes of deltas and bases that the replica keeps in host memory.
        process: Id of the replica's process.
    """

    png: bytes
    met: Met
    compose_s: float
    report: str
    kept_bytes: int
    process: int


@dataclass(frozen=True)
class Refusal:
    """An order that its LoRAs make impossible. A value, since it is no fault of the replica.

    Attributes:
        status: The HTTP status that says so.
        reason: The same in words.
    """

    status: int
    reason: str
