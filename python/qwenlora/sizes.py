"""Sizes from which the engine goes another way: what is small is done exactly, or all at once.

All of them are in one value, so that the ways of large sums and files can be taken with small ones.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["Sizes", "current", "sized"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes that are in force.

    Attributes:
        exact_side: A sum with a side, or a number of ranks, up to this is decomposed exactly.
        shifts: By iteration: shift of the operator, in mean energies of the directions outside of
            the basis. After one iteration a basis holds too little, so that the mean outside is
            estimated too large.
        cpu_multiplies_bfloat16: Whether the CPU multiplies bfloat16 as such. None asks it: without
            instructions for it torch takes three times as long.
        cpu_batches: Whether the CPU compresses sums in batches. One sum fills all of its cores, so
            that only devices gain by many small products at once.
        batch_bytes: Most bytes that a batch of sums takes beside the slots.
        panel_bytes: Bytes of a matrix's rows that are formed at a time to measure it.
        exact_svd_side: A dense delta with a side up to this is decomposed fully, a larger one by a
            range finder.
        formed_bytes: Most bytes that are formed for one packing recipe, unless one slot takes more;
            a few recipes wait. Much: after each operation torch's threads spin for a while, on
            cores that packing needs.
        merge_exact_rank: Ranks of a merge's sum that is decomposed exactly; 1024 take five seconds
            per module.
        merge_first_rank: Ranks that a merge looks at first where the rank follows from the energy;
            doubled until enough.
        merge_metadata_bytes: Most bytes that the sources' entries take in a merged file: a longer
            header is not read everywhere.
    """

    exact_side: int = 128
    shifts: tuple[float, ...] = (0.0, 0.5, 1.0, 1.0)
    cpu_multiplies_bfloat16: bool | None = None
    cpu_batches: bool = False
    batch_bytes: int = 256 << 20
    panel_bytes: int = 32 << 20
    exact_svd_side: int = 1024
    formed_bytes: int = 64 << 20
    merge_exact_rank: int = 512
    merge_first_rank: int = 128
    merge_metadata_bytes: int = 8 << 20


_current = Sizes()


def current() -> Sizes:
    """The sizes in force."""
    return _current


@contextlib.contextmanager
def sized(**fields: Any) -> Iterator[None]:
    """Put other sizes in force, for tests: smaller sizes take the ways of large ones.

    They hold in the whole process, since work is done on threads of its own. Those of before come
    back in the end; contexts may be nested.

    Args:
        fields: Fields of `Sizes`; all others stay as they are.
    """
    global _current
    before = _current
    _current = replace(before, **fields)
    try:
        yield
    finally:
        _current = before
