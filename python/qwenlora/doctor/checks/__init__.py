"""Judges facts: pure functions from `Facts` to findings, a module per subject."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.doctor.checks import comfyui, gpu, nunchaku, qwenlora, torch
from qwenlora.doctor.finding import Finding, Severity

if TYPE_CHECKING:
    from qwenlora.doctor.facts import Facts

__all__ = ["judge"]

_CHECKS = (*qwenlora.CHECKS, *torch.CHECKS, *gpu.CHECKS, *nunchaku.CHECKS, *comfyui.CHECKS)


def judge(facts: Facts) -> tuple[Finding, ...]:
    """All findings, problems first; otherwise in the order of the checks."""
    order = list(Severity)
    found = (finding for check in _CHECKS for finding in check(facts))
    return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))
