"""The settings of the application: arguments of `serve run`, and of a configuration file."""

from __future__ import annotations

import enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["PipelineKind", "Routing", "Settings"]

_GIB = 1 << 30


class PipelineKind(str, enum.Enum):
    """The model that replicas load."""

    EMULATED = "emulated"
    """Tiny, with random weights, on the CPU: everything but the pictures is real."""

    NUNCHAKU = "nunchaku"
    """Nunchaku's Qwen-Image on a GPU."""


class Routing(str, enum.Enum):
    """The choice of the replica that a request goes to."""

    BY_STACK = "by-stack"
    """One that holds the stack, by Ray's model multiplexing."""

    AT_RANDOM = "at-random"
    """Any: of two that are drawn, the one where fewer requests wait. To compare with."""


class Settings(BaseModel):
    """Everything that can be chosen.

    Attributes:
        folder: The LoRA files, in a place that all nodes see.
        pipeline: The model.
        replicas: Copies of the model.
        cpus: CPU cores of each.
        gpus: GPUs of each.
        stacks: Most stacks that one replica holds.
        cache_bytes: Most bytes of deltas that one replica keeps in host memory.
        device_cache_bytes: Most bytes that it keeps on its GPU; None: what leaves 8 GiB free.
        waiting: Most requests that are in one replica, the one that it works on among them. Where
            the replicas that hold a stack are full, its next request goes to another one. More keep
            stacks together, and leave other replicas idle.
        attempts: Most replicas that a request is given to, one after the other, when they die.
        routing: Who gets a request.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    pipeline: PipelineKind = PipelineKind.EMULATED
    replicas: int = Field(default=2, ge=1)
    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)
    stacks: int = Field(default=16, ge=1)
    cache_bytes: int = Field(default=5 * _GIB // 2, ge=0)
    device_cache_bytes: int | None = Field(default=None, ge=0)
    waiting: int = Field(default=2, ge=1)
    attempts: int = Field(default=3, ge=1)
    routing: Routing = Routing.BY_STACK
