"""Checks that Nunchaku has kernels for the GPU, and says which files it needs there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.doctor.finding import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenlora.doctor.facts import Capability, Facts, Gpu

__all__ = ["CHECKS", "precision_of"]

_INT4: frozenset[Capability] = frozenset({(7, 5), (8, 0), (8, 6), (8, 9)})
_NVFP4: frozenset[Capability] = frozenset({(12, 0), (12, 1)})
_TURING: Capability = (7, 5)
_GB = 1024**3
# The int4 transformer takes 11.5 GB, and activations and the text encoder want room besides.
_RESIDENT_BYTES = 15 * _GB


def precision_of(capability: Capability) -> str | None:
    """The precision that Nunchaku computes in: `int4`, `nvfp4`, or None where it refuses."""
    if capability in _INT4:
        return "int4"
    return "nvfp4" if capability in _NVFP4 else None


def _gpus(facts: Facts) -> Iterator[Finding]:
    if not facts.gpus:
        yield Finding(
            severity=Severity.NOTE,
            code="gpu-none",
            text="no NVIDIA GPU is found: Nunchaku's models cannot run here; looking at files, and"
            " scripting with emulated layers, can",
        )
    for gpu in facts.gpus:
        yield _judge(gpu)


def _judge(gpu: Gpu) -> Finding:
    sm = f"sm_{gpu.capability[0]}{gpu.capability[1]}"
    precision = precision_of(gpu.capability)
    if precision is None:
        return Finding(
            severity=Severity.PROBLEM,
            code="gpu-unsupported",
            text=f"{gpu.name} ({sm}): Nunchaku's wheels hold no code for it; they have sm_75, 80,"
            " 86 and 89 (int4), and 120 and 121 (nvfp4). No setting changes that",
        )
    files = "svdq-fp4_*" if precision == "nvfp4" else "svdq-int4_*"
    parts = [f"{gpu.name} ({sm}) runs Nunchaku in {precision}: use files named {files}"]
    if gpu.capability == _TURING:
        parts.append("it computes in float16")
    if gpu.memory_bytes < _RESIDENT_BYTES:
        parts.append("the model is offloaded block by block, which qwenlora takes part in")
    return Finding(severity=Severity.OK, code="gpu", text="; ".join(parts))


CHECKS = (_gpus,)
