"""Facts and findings as one JSON document, schema 1; fields may be added within it."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlora.doctor.finding import Finding, Severity
from qwenlora.doctor.fitting import Interpreter
from qwenlora.doctor.mend import Mend, Run, Shell, spell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenlora.doctor.facts import Facts

__all__ = ["SCHEMA", "to_json"]

SCHEMA = 1


def to_json(facts: Facts, findings: Sequence[Finding]) -> str:
    """The document as one line."""
    problems = sum(f.severity is Severity.PROBLEM for f in findings)
    document = {
        "schema": SCHEMA,
        "problems": problems,
        "findings": [
            {
                "severity": finding.severity.value,
                "code": finding.code,
                "text": finding.text,
                "mends": [_mend(mend, facts.system.shell) for mend in finding.mends],
            }
            for finding in findings
        ],
        "facts": _plain(facts),
    }
    return json.dumps(document, ensure_ascii=True)


def _mend(mend: Mend, shell: Shell) -> dict[str, Any]:
    argv = list(mend.argv) if isinstance(mend, Run) else None
    return {"command": spell(mend, shell), "argv": argv}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Interpreter):
        return {name: _plain(own) for name, own in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
