"""Facts and findings for people: 80 columns, readable without colour."""

from __future__ import annotations

import textwrap
from enum import Enum
from typing import TYPE_CHECKING

from qwenlora.console import plain
from qwenlora.doctor.checks.gpu import precision_of
from qwenlora.doctor.facts import Environment, Facts, Gpu, Host, Layout, NunchakuKind, Pack
from qwenlora.doctor.finding import Finding, Severity
from qwenlora.doctor.mend import spell

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Palette", "paint"]

_WIDTH = 80
_LABEL_WIDTH = 15
_GB = 1024**3
# In the order of the screen; torch and nunchaku have more to say than a version.
_SHOWN = ("qwenlora", "numpy", "safetensors", "diffusers", "peft")
_TONES = {
    Severity.PROBLEM: "\x1b[1;31m",
    Severity.NOTE: "\x1b[1;33m",
    Severity.OK: "\x1b[1;32m",
}
_FAINT = "\x1b[2m"
_PLAIN = "\x1b[0m"
_Row = tuple[str, str]


class Palette(Enum):
    """The ways to paint the text."""

    PLAIN = "plain"
    ANSI = "ansi"


def paint(facts: Facts, findings: Sequence[Finding], palette: Palette) -> str:
    """The screen, each line ended."""
    lines = [_verdict(findings), ""]
    lines += _rows(_system(facts), palette)
    for environment in facts.environments:
        lines += ["", plain(_title(environment)), *_rows(_environment(environment), palette)]
    for host in facts.hosts:
        lines += ["", plain(f"ComfyUI {host.root}"), *_rows(_host(host), palette)]
    for finding in findings:
        lines += ["", *_finding(finding, facts, palette)]
    return "".join(f"{line}\n" for line in lines)


def _verdict(findings: Sequence[Finding]) -> str:
    def count(severity: Severity, word: str) -> str:
        number = sum(f.severity is severity for f in findings)
        return f"{number} {word}" if number == 1 else f"{number or 'no'} {word}s"

    problems, notes = count(Severity.PROBLEM, "problem"), count(Severity.NOTE, "note")
    return f"qwenlora doctor: {problems}, {notes}"


def _system(facts: Facts) -> Iterator[_Row]:
    system = facts.system
    yield "system", f"{system.name} {system.release}, {system.machine}"
    if not facts.gpus:
        yield "GPU", "none found"
    for gpu in facts.gpus:
        yield "GPU", _gpu(gpu)


def _gpu(gpu: Gpu) -> str:
    precision = precision_of(gpu.capability) or "not supported by Nunchaku"
    driver = f", driver {gpu.driver}" if gpu.driver else ""
    sm = f"sm_{gpu.capability[0]}{gpu.capability[1]}"
    return f"{gpu.name}, {gpu.memory_bytes / _GB:.0f} GiB, {sm}: {precision}{driver}"


def _title(environment: Environment) -> str:
    whose = "this Python" if environment.is_current else "Python"
    return f"{whose} {environment.python}"


def _environment(environment: Environment) -> Iterator[_Row]:
    if environment.version is None:
        yield "version", f"{environment.fault}"
        return
    yield "version", ".".join(map(str, environment.version))
    yield "torch", _torch(environment)
    yield "nunchaku", _nunchaku(environment)
    for name in _SHOWN:
        yield name, environment.version_of(name) or "-"


def _torch(environment: Environment) -> str:
    torch = environment.torch
    if torch is None:
        return "-"
    if torch.error is not None:
        return f"broken: {torch.error}"
    cuda = f"CUDA {torch.cuda}" if torch.cuda else "built without CUDA"
    return f"{torch.version} ({cuda})"


def _nunchaku(environment: Environment) -> str:
    if environment.nunchaku is NunchakuKind.ABSENT:
        return "-"
    version = environment.version_of("nunchaku") or "without metadata"
    if environment.nunchaku is NunchakuKind.ENGINE:
        return version
    return f"{version} ({environment.nunchaku.value})"


def _host(host: Host) -> Iterator[_Row]:
    layout = "" if host.layout is Layout.PLAIN else f" ({host.layout.value})"
    yield "version", f"{host.version or 'unknown'}{layout}"
    yield "runs in", f"{host.python}{'' if host.is_own_python else ' (assumed)'}"
    for label, pack in zip(_labels("node packs"), host.packs, strict=False):
        yield label, _pack(pack)
    if not host.packs:
        yield "node packs", "none that matter here"


def _labels(first: str) -> Iterator[str]:
    yield first
    while True:
        yield ""


def _pack(pack: Pack) -> str:
    kind = "" if pack.kind.value in pack.path.name else f", which is {pack.kind.value}"
    disabled = "" if pack.is_enabled else " (disabled)"
    return f"{pack.path.name} {pack.version or ''}".rstrip() + kind + disabled


def _finding(finding: Finding, facts: Facts, palette: Palette) -> Iterator[str]:
    label = (
        finding.severity.value.upper()
        if finding.severity is Severity.PROBLEM
        else (finding.severity.value)
    )
    first, *rest = _wrap(finding.text)
    yield f"{_toned(label, _TONES[finding.severity], palette)}{_pad(label, 9)}{first}"
    yield from (f"{'':9}{line}" for line in rest)
    for mend in finding.mends:
        # Whole, so that it can be copied.
        yield f"{'':9}{_toned('$', _FAINT, palette)} {plain(spell(mend, facts.system.shell))}"


def _rows(rows: Iterator[_Row], palette: Palette) -> Iterator[str]:
    for label, text in rows:
        first, *rest = _wrap(text, _WIDTH - _LABEL_WIDTH)
        yield f"  {_toned(label, _FAINT, palette)}{_pad(label, _LABEL_WIDTH - 2)}{first}"
        yield from (f"{'':{_LABEL_WIDTH}}{line}" for line in rest)


def _wrap(text: str, width: int = _WIDTH - 9) -> list[str]:
    # A path stays whole, so that it can be copied.
    lines = textwrap.wrap(plain(text), width, break_long_words=False, break_on_hyphens=False)
    return lines or [""]


def _pad(label: str, width: int) -> str:
    return " " * (width - len(label))


def _toned(text: str, tone: str, palette: Palette) -> str:
    return f"{tone}{text}{_PLAIN}" if palette is Palette.ANSI and text else text
