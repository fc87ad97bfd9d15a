"""Weights by parts of layers' paths, as factors by block and kind of layer.

diffusers gives a layer the first entry of the dict whose key is anywhere in the layer's path, and 1
where there is none. Factors by block are coarser than single layers, and are products of a block's
and of kinds'. So a dict becomes one LoRA with factors where it can, else several. Each layer gets
one of them alone, so this costs no rank.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from typing import TYPE_CHECKING

from qwenlora import _core
from qwenlora.blocks import BlockFactors
from qwenlora.errors import AdapterWeightError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from typing import TypeAlias

__all__ = ["Part", "parts_of"]

_log = logging.getLogger("qwenlora")

Part: TypeAlias = "tuple[float, BlockFactors]"
"""A strength, and factors on it."""
Cell: TypeAlias = "tuple[int | None, frozenset[str]]"
"""The finest that factors tell apart: a block's number, None outside of blocks, and kinds."""
Table: TypeAlias = "Mapping[Cell, tuple[float, str]]"
"""The weight of every cell, and a path in it."""

_LAYERS = ("attn", "mlp", "mod")
_STREAMS = ("img", "txt")
_OUTSIDE = "rest"
_ROUNDING = 1e-12
"""Relative error of a product of factors."""


def parts_of(name: str, by_name: Sequence[tuple[str, float]], paths: Iterable[str]) -> list[Part]:
    """The factors that give every path what diffusers would give it.

    Args:
        name: The adapter's name, for messages.
        by_name: Parts of paths and their weights, in order.
        paths: The layers that the adapter changes.

    Returns:
        At most one part that is not 0 for each path.

    Raises:
        AdapterWeightError: Two layers that no factors tell apart would get different weights.
    """
    table = _table(name, by_name, list(paths))
    parts = _as_one(table) or list(_as_several(name, table))
    for weight, path in table.values():
        given = [own for own in (strength * by.factor(path) for strength, by in parts) if own != 0]
        if len(given) > 1 or not math.isclose(sum(given), weight, rel_tol=_ROUNDING):
            raise _not_apart(name, weight, path, sum(given), "others")
    return parts


def _table(name: str, by_name: Sequence[tuple[str, float]], paths: Collection[str]) -> Table:
    cells: dict[Cell, tuple[float, str]] = {}
    for path in paths:
        weight = next((own for part, own in by_name if part in path), 1.0)
        facts = _core.layer_kinds(path)
        if facts is None:
            raise AdapterWeightError(f"`{name}`: `{path}` is no layer that has a weight of its own")
        cell = (facts[0], frozenset(facts[1]))
        other, of = cells.setdefault(cell, (weight, path))
        if other != weight:
            raise _not_apart(name, other, of, weight, f"`{path}`")
    _warn(name, by_name, paths)
    return cells


def _not_apart(name: str, one: float, path: str, two: float, other: str) -> AdapterWeightError:
    return AdapterWeightError(
        f"`{name}` would get {one} at `{path}` and {two} at {other}: weights can differ"
        " by block, and between attn, mlp, mod, img, txt and what is outside of blocks"
    )


def _warn(name: str, by_name: Sequence[tuple[str, float]], paths: Collection[str]) -> None:
    """Say what diffusers passes over: keys of no layer, and those of more blocks than it seems."""
    for part, _ in by_name:
        if not any(part in path for path in paths):
            _log.warning("weights of `%s`: `%s` is in no layer's name", name, part)
        more = next((path for path in paths if _goes_on(part, path)), None)
        if more is not None:
            _log.warning(
                "weights of `%s`: `%s` also holds for `%s`: write `%s.`", name, part, more, part
            )


def _goes_on(part: str, path: str) -> bool:
    """Tell if a part ends within a number of the path."""
    return part[-1:].isdigit() and path.partition(part)[2][:1].isdigit()


def _as_one(table: Table) -> list[Part]:
    """One part for all, or none where a product of simple factors does not do."""
    for strength, blocks, kinds in _simple(table):
        factors = BlockFactors.build(blocks=blocks, kinds=kinds)
        if all(strength * factors.factor(path) == weight for weight, path in table.values()):
            return [(strength, factors)]
    return []


def _simple(table: Table) -> Iterator[tuple[float, dict[int, float], dict[str, float]]]:
    """What may be all there is to it: one number, or numbers by block, by kind or by stream."""
    weights = {cell: weight for cell, (weight, _) in table.items()}
    yield next(iter(weights.values()), 1.0), {}, {}
    outside = [weight for (number, _), weight in weights.items() if number is None]
    rest = {_OUTSIDE: outside[0]} if outside else {}
    yield 1.0, {number: own for (number, _), own in weights.items() if number is not None}, rest
    for names in (_LAYERS, _STREAMS):
        inside = {
            kind: weight
            for (number, kinds), weight in weights.items()
            for kind in names
            if number is not None and kind in kinds
        }
        yield 1.0, {}, {**inside, **rest}
        yield 1.0, {}, inside


def _as_several(name: str, table: Table) -> Iterator[Part]:
    """A part for the layers outside of blocks, and some for each group of blocks that are alike."""
    rows: dict[int | None, dict[frozenset[str], float]] = defaultdict(dict)
    for (number, kinds), (weight, _) in table.items():
        rows[number][kinds] = weight
    outside = rows.pop(None, {})
    numbers = [number for number in rows if number is not None]
    no_block = dict.fromkeys(numbers, 0.0)
    yield from _outside(name, outside, no_block)
    alike: dict[frozenset[tuple[frozenset[str], float]], list[int]] = defaultdict(list)
    for number in numbers:
        alike[frozenset(rows[number].items())].append(number)
    for row, group in alike.items():
        only = {number: 0.0 for number in numbers if number not in group}
        is_one = len({weight for _, weight in row}) == 1
        cells = sorted(row, key=lambda cell: sorted(cell[0]))
        for kinds, weight in cells[:1] if is_one else cells:
            none_of = {} if is_one else _without(kinds)
            if weight != 0:
                yield weight, BlockFactors.build(blocks=only, kinds={**none_of, _OUTSIDE: 0.0})


def _without(kinds: frozenset[str]) -> dict[str, float]:
    """Factors of 0 for all but some kinds."""
    return {kind: 0.0 for kind in (*_LAYERS, *_STREAMS) if kind not in kinds}


def _outside(
    name: str, row: Mapping[frozenset[str], float], no_block: Mapping[int, float]
) -> Iterator[Part]:
    """The layers outside of blocks: of the image, of the text, and of neither."""
    by_stream = {stream: _only(name, row, {stream}) for stream in _STREAMS}
    neither = _only(name, row, set())
    if neither is None:
        for stream, weight in by_stream.items():
            if weight:
                others = {other: 0.0 for other in _STREAMS if other != stream}
                yield weight, BlockFactors.build(blocks=no_block, kinds=others)
    elif neither != 0:
        ratios = {key: own / neither for key, own in by_stream.items() if own is not None}
        yield neither, BlockFactors.build(blocks=no_block, kinds=ratios)
    elif any(by_stream.values()):
        raise AdapterWeightError(
            f"`{name}`: layers outside of blocks cannot be on for one stream while those of neither"
            " stream are off"
        )


def _only(name: str, row: Mapping[frozenset[str], float], streams: set[str]) -> float | None:
    """The weight of all layers outside of blocks that are of these streams; None without any."""
    own = {kinds: weight for kinds, weight in row.items() if kinds & {*_STREAMS} == streams}
    weights = sorted(set(own.values()))
    if len(weights) > 1:
        raise AdapterWeightError(
            f"`{name}`: layers outside of blocks would get {weights[0]} and {weights[-1]}: their"
            " weights can differ between those of the image, of the text, and of neither"
        )
    return weights[0] if weights else None
