"""A merge's report for people: 80 columns, as `qwenlora-keys` shows files."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING

from qwenlora.console import plain, size
from qwenlora.merge.metadata import METADATA
from qwenlora.merge.report import lost_of
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qwenlora.merge.cut import Cut
    from qwenlora.merge.report import BaseReport, MergeReport
    from qwenlora.plan.documents import Skip
    from qwenlora.report import LoraReport

__all__ = ["paint"]

_WIDTH = 80
_LABEL_WIDTH = 13
_MAX_RANKS = 4
"""More different ranks than this are shown as a span."""
_Row = tuple[str, str]


def paint(report: MergeReport, cut: Cut | None) -> str:
    """The screen, each line ended."""
    verdict = "MERGED" if report.complete else "PARTIAL"
    rows = [(verdict, report.path), ("", _summary(report, cut)), *_losses(report)]
    lines = [line for row in rows for line in _lines(*row)]
    lines.append("")
    lines += [line for row in _facts(report) for line in _lines(*row)]
    return "".join(f"{line}\n" for line in lines)


def _summary(report: MergeReport, cut: Cut | None) -> str:
    modules = counted(len(report.modules), "module")
    values = f" and {counted(len(report.values), 'value')}" if report.values else ""
    if cut is None:
        return f"{modules}{values}, exact to the rounding of {report.dtype}"
    worst = report.worst
    if worst is None:
        return f"{modules}{values}; nothing had to be cut"
    return (
        f"{modules}{values}; {report.share_lost:.2%} of the energy lost, at most"
        f" {worst.share_lost:.2%} (`{worst.path}`)"
    )


def _losses(report: MergeReport) -> Iterator[_Row]:
    """Rows on what the result lacks, and why."""
    for lora in report.loras:
        yield from _reasons("  left out", lora, lost_of(lora))
    if report.vanished:
        sums = counted(len(report.vanished), "sum")
        yield "  left out", f"{sums} too small for {report.dtype}, but not for `--dtype bf16`"
        yield "    e.g.", report.vanished[0]


def _facts(report: MergeReport) -> Iterator[_Row]:
    for lora in report.loras:
        yield "  source", f"{lora.name} x {lora.weight_text}: {_modules(lora)}"
        yield from _reasons("  turned off", lora, lora.turned_off)
        yield from (("  note", note) for note in filter(None, (*lora.notes, lora.blocks_note)))
    if report.base is not None:
        yield "  base", _base(report.base)
    yield "  file", f"{size(report.size_bytes)}, {report.dtype}, in {report.seconds:.1f} s"
    if report.modules:
        yield "  ranks", _ranks([module.rank for module in report.modules])
    if report.values:
        text = "of biases, norms and tables: ComfyUI and qwenlora read them, diffusers refuses"
        yield "  values", f"{len(report.values)}, {text} the file"
    yield from _metadata(report)
    if report.zero:
        yield "  zero", f"{counted(len(report.zero), 'sum')} of nothing, e.g. `{report.zero[0]}`"
    for lora in report.loras:
        harmless = [skip for skip in lora.skipped if skip.harmless]
        yield from _reasons("  ignored", lora, harmless)


def _base(base: BaseReport) -> str:
    text = f"{base.name}, {base.form}: of its weights are {counted(base.modules, 'module')}"
    if base.estimated:
        text += f"; norms of {base.estimated} are estimated, as the quantized weight has others"
    return text


def _metadata(report: MergeReport) -> Iterator[_Row]:
    """Rows on the sources' metadata: kept, listed or dropped; none where there is none."""
    kept, listed = len(report.metadata_kept), sum(map(len, report.metadata_listed))
    if kept or listed:
        text = f"{kept} of the sources' entries kept, {listed} listed in `{METADATA}`"
        yield "  metadata", text
    for lora, dropped in zip(report.loras, report.metadata_dropped, strict=True):
        if dropped:
            entries = counted(len(dropped), "entry", "entries")
            yield "", f"{entries} of {lora.name} too long to keep, e.g. `{dropped[0]}`"


def _reasons(label: str, lora: LoraReport, skips: Sequence[Skip]) -> Iterator[_Row]:
    counts = Counter(skip.reason for skip in skips)
    for reason, count in counts.most_common():
        example = next(skip.name for skip in skips if skip.reason == reason)
        yield label, f"{count} of {lora.name}: {reason}"
        yield "    e.g.", example


def _modules(lora: LoraReport) -> str:
    if lora.all_zero:
        return "all zero"
    return counted(lora.modules_applied, "module")


def _ranks(ranks: Sequence[int]) -> str:
    counts = sorted(Counter(ranks).items())
    if len(counts) == 1:
        return str(ranks[0])
    if len(counts) <= _MAX_RANKS:
        return ", ".join(f"{rank} ({count})" for rank, count in counts)
    ordered = sorted(ranks)
    return f"{ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}"


def _lines(label: str, text: str) -> Iterator[str]:
    # A path stays whole, so that it can be copied.
    wrapped = textwrap.wrap(
        plain(text), _WIDTH - _LABEL_WIDTH, break_long_words=False, break_on_hyphens=False
    )
    for first, line in zip((label, *[""] * len(wrapped)), wrapped or [""], strict=False):
        yield f"{first:{_LABEL_WIDTH}}{line}".rstrip()
