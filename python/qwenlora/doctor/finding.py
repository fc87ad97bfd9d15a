"""Findings: each says what was found, how grave it is and what mends it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenlora.doctor.mend import Mend

__all__ = ["Finding", "Severity"]


class Severity(Enum):
    """The severity of a finding."""

    PROBLEM = "problem"
    """Something does not work, or works wrongly."""
    NOTE = "note"
    """Worth knowing; all works, or is not wanted."""
    OK = "ok"
    """Checked, and as it should be."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing found.

    Attributes:
        code: Its name, which stays the same from version to version.
        text: What it is, and what follows from it.
        mends: Commands to be run in this order; none where no command can mend it.
    """

    severity: Severity
    code: str
    text: str
    mends: tuple[Mend, ...] = ()
