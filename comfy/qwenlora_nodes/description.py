"""A LoRA file in words, for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from qwenlora.about import About
from qwenlora.console import plain
from qwenlora.map.grid import kind_of
from qwenlora.words import counted

__all__ = ["describe"]

_MODELS = {"qwen-image": "Qwen-Image", "z-image": "Z-Image"}
_EXACTNESS = {
    "exact": "exact",
    "norms": "exact but for the norms of the 16-bit weights, which are estimated",
    "truncated": "cut to a rank, optimally",
}


def describe(name: str, plan: Mapping[str, Any], producer: str) -> Iterator[str]:
    """Lines on a file.

    Args:
        name: What the file is called.
        plan: Its FilePlan document.
        producer: Which program wrote it.
    """
    yield f"{name}: {plan['verdict']}"
    if plan["reason"]:
        yield f"  {plan['reason']}"
    model = _MODELS.get(plan["model"], plan["model"] or "unknown")
    yield f"  model: {model}, {plan['size_bytes'] / 1e6:.1f} MB"
    yield f"  producer: {producer}"
    yield from (f"  {line}" for line in About.of(plan["metadata"]).lines())
    kinds = Counter(
        (module["adapter"], module["rank"], module["supported"]) for module in plan["modules"]
    )
    for (adapter, rank, supported), count in kinds.most_common():
        ranked = "" if rank is None else f" of rank {rank}"
        modules = counted(count, "module")
        yield f"  {modules}: {adapter}{ranked}{'' if supported else ', not supported'}"
    yield from _exactness(plan["modules"])
    reasons = Counter(tensor["reason"] for tensor in plan["tensors"] if tensor["reason"])
    for reason, count in reasons.most_common():
        yield f"  left out: {counted(count, 'tensor')}, {reason}"
    yield from (f"  note: {plain(note)}" for note in plan["notes"])


def _exactness(modules: list[Mapping[str, Any]]) -> Iterator[str]:
    """How exactly each kind of layer is applied."""
    found: dict[str, Counter[str]] = {}
    for module in modules:
        if module["supported"]:
            exactness = found.setdefault(kind_of(module["target"]), Counter())
            exactness[module["exactness"]] += 1
    for kind, counts in found.items():
        ways = (
            f"{count} {_EXACTNESS.get(exactness, exactness)}"
            for exactness, count in counts.most_common()
        )
        yield f"  {kind}: {', '.join(ways)}"
