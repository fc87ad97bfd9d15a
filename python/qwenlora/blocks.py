"""Strength per block: factors by the number of a block and by the kind of a layer.

The text form is `0-19:1, 20-39:0.5, 40-59:0; mod:0`. Blocks and kinds that are not named have
factor 1. A layer's factor is the product of its block's and of those of all kinds that it is of.
Which layer is of which kind is in the tables of the models.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenlora import _core
from qwenlora.entries import Piece, factor_of, number_text, sections, shown
from qwenlora.errors import BlockFactorsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["ALL_ONES", "KINDS", "BlockFactors", "count_blocks"]

KINDS = {
    "attn": "the attention",
    "mlp": "the MLPs",
    "mod": "the modulation",
    "img": "layers that work on the image alone",
    "txt": "layers that work on the text alone",
    "rest": "layers outside of the numbered blocks",
}
"""The kinds of layer that have factors, in the order of the canonical text."""
_MOST_BLOCKS = 10_000
_RANGE = re.compile(r"([0-9]+)\s*(?:-\s*([0-9]+))?")
_WAY_OUT = "\nhint: for example `0-19:1, 20-39:0.5; mod:0`; the kinds are " + ", ".join(KINDS)


@dataclass(frozen=True)
class BlockFactors:
    """Factors on a LoRA's delta by block and by kind of layer. Immutable and hashable.

    Factors of 1 are left out, and neighbouring blocks with one factor are one range. So two are
    equal exactly where every block and kind has the same factor in both. Made by `parse`, `of` and
    `build`.

    Attributes:
        blocks: (first block, last block, factor), ascending, apart from each other, none 1.
        kinds: (kind, factor) in the order of `KINDS`, none 1.
    """

    blocks: tuple[tuple[int, int, float], ...] = ()
    kinds: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> BlockFactors:
        """Read the text form.

        Sections are divided by `;`, entries by `,`. An entry is a block's number, a range of them
        or a kind of layer, then `:` and a factor. White space is free. A text without an entry
        leaves every factor 1.

        Raises:
            BlockFactorsError: The text is of another form, ranges overlap, or a factor is not
                finite.
        """
        blocks: list[_Range] = []
        kinds: dict[str, float] = {}
        for entry in _entries(text):
            name, number = _split(entry)
            factor = factor_of(number, _wrong)
            if name.text[:1].isdigit():
                first, last = _range(name)
                blocks.append(_Range(first, last, factor, name))
            else:
                kind = _kind(name)
                if kind in kinds:
                    raise _wrong(name, "is named twice", "name each kind once")
                kinds[kind] = factor
        return cls(_joined(blocks), _ordered(kinds))

    @classmethod
    def of(cls, value: str | BlockFactors | None) -> BlockFactors:
        """Bring every accepted form to factors; None is 1 everywhere.

        Raises:
            BlockFactorsError: A text is of another form.
            TypeError: It is neither text nor factors.
        """
        if value is None:
            return ALL_ONES
        if isinstance(value, BlockFactors):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        raise TypeError(f"factors by block are text or `BlockFactors`, not {type(value).__name__}")

    @classmethod
    def build(
        cls,
        *,
        blocks: Mapping[int, float] | None = None,
        kinds: Mapping[str, float] | None = None,
    ) -> BlockFactors:
        """Make factors from numbers.

        Args:
            blocks: Factors by the number of the block.
            kinds: Factors by kind, as in `KINDS`.

        Raises:
            BlockFactorsError: A number or a kind is none, or a factor is not finite.
        """
        texts = [f"{number}:{float(factor)!r}" for number, factor in (blocks or {}).items()]
        texts += [f"{kind}:{float(factor)!r}" for kind, factor in (kinds or {}).items()]
        return cls.parse(", ".join(texts))

    def __str__(self) -> str:
        """The canonical text: ascending ranges, then kinds; empty where every factor is 1."""
        blocks = ", ".join(
            f"{_range_text(first, last)}:{number_text(factor)}"
            for first, last, factor in self.blocks
        )
        kinds = ", ".join(f"{kind}:{number_text(factor)}" for kind, factor in self.kinds)
        return "; ".join(filter(None, (blocks, kinds)))

    def __bool__(self) -> bool:
        """True where some factor is not 1."""
        return bool(self.blocks or self.kinds)

    @property
    def has_zero(self) -> bool:
        """True where some layer may have factor 0."""
        return any(row[-1] == 0 for row in (*self.blocks, *self.kinds))

    def factor(self, path: str) -> float:
        """The factor of the layer at a module path such as `transformer_blocks.3.attn.to_q`.

        1 for a path that no known model has.
        """
        if not self:
            return 1.0
        facts = _facts(path)
        return 1.0 if facts is None else self._factor_of(*facts)

    def zeros(self, paths: Iterable[str]) -> list[int]:
        """The places in `paths` of the layers that have factor 0."""
        if not self.has_zero:
            return []
        return [at for at, path in enumerate(paths) if self.factor(path) == 0]

    def outside(self, count: int) -> str:
        """Say which blocks are named that a model lacks; empty where it has all of them.

        Args:
            count: The model's numbered blocks: 0 to `count` - 1.
        """
        beyond = [
            _range_text(max(first, count), last) for first, last, _ in self.blocks if last >= count
        ]
        if not beyond:
            return ""
        has = f"the blocks 0 to {count - 1}" if count else "no numbered blocks"
        return f"`blocks` names {', '.join(beyond)}, but the model has {has}"

    def _factor_of(self, number: int | None, kinds: tuple[str, ...]) -> float:
        own = [factor for kind, factor in self.kinds if kind in kinds]
        if number is not None:
            own += [factor for first, last, factor in self.blocks if first <= number <= last]
        # One factor of 0 is enough, and zero has one sign.
        return 0.0 if 0.0 in own else math.prod(own) + 0.0


ALL_ONES = BlockFactors()
"""Every factor is 1."""


def count_blocks(paths: Iterable[str]) -> int:
    """The numbered blocks of the model that has these layers: one more than the last number."""
    facts = filter(None, map(_facts, paths))
    return max((number + 1 for number, _ in facts if number is not None), default=0)


@functools.lru_cache(maxsize=4096)
def _facts(path: str) -> tuple[int | None, tuple[str, ...]] | None:
    """The number of a module's block, and the kinds of layer that it is of."""
    found = _core.layer_kinds(path)
    return None if found is None else (found[0], tuple(found[1]))


@dataclass(frozen=True)
class _Range:
    first: int
    last: int
    factor: float
    name: Piece


def _entries(text: str) -> Iterator[Piece]:
    """The entries; a section may be empty, an entry may not."""
    for section in sections(text):
        for entry in section:
            if not entry.text:
                raise _wrong(entry, "is an empty entry", "leave out one comma")
            yield entry


def _split(entry: Piece) -> tuple[Piece, Piece]:
    parts = entry.split()
    if parts is None:
        raise _wrong(entry, "has no factor", "write the factor behind a colon")
    return parts


def _range(name: Piece) -> tuple[int, int]:
    found = _RANGE.fullmatch(name.text)
    if found is None:
        raise _wrong(name, "is no block and no range of blocks", "write `3` or `0-19`")
    # Longer numbers are not looked at: reading them takes time.
    digits = [number.lstrip("0")[:9] or "0" for number in found.groups() if number is not None]
    first, last = int(digits[0]), int(digits[-1])
    if max(first, last) >= _MOST_BLOCKS:
        raise _wrong(name, "is a block that no model has", "blocks are counted from 0")
    if last < first:
        raise _wrong(name, "ends before it begins", f"write `{last}-{first}`")
    return first, last


def _kind(name: Piece) -> str:
    kind = name.text.lower()
    if kind not in KINDS:
        raise _wrong(name, "is neither a block nor a kind of layer", "write `3`, `0-19` or a kind")
    return kind


def _joined(ranges: Iterable[_Range]) -> tuple[tuple[int, int, float], ...]:
    """Ascending ranges apart from each other, neighbours with one factor joined."""
    joined: list[tuple[int, int, float]] = []
    before: _Range | None = None
    for own in sorted(ranges, key=lambda own: (own.first, own.name.begin)):
        if before is not None and own.first <= before.last:
            earlier, later = sorted((before.name, own.name), key=lambda name: name.begin)
            raise _wrong(later, f"overlaps `{shown(earlier.text)}`", "name each block once")
        before = own
        if own.factor == 1:
            continue
        if joined and joined[-1][1] + 1 == own.first and joined[-1][2] == own.factor:
            joined[-1] = (joined[-1][0], own.last, own.factor)
        else:
            joined.append((own.first, own.last, own.factor))
    return tuple(joined)


def _ordered(kinds: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple((kind, kinds[kind]) for kind in KINDS if kinds.get(kind, 1.0) != 1)


def _range_text(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _wrong(piece: Piece, what: str, way_out: str) -> BlockFactorsError:
    return BlockFactorsError(
        f"`{shown(piece.text)}` at character {piece.begin + 1} {what}: {way_out}{_WAY_OUT}",
        part=piece.text,
        position=piece.begin,
    )
