"""The engine's own points at which tests let a fault happen: no other place names them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.compose import rescale
from qwenlora.compose.journal import Journal
from qwenlora.compose.placer import Placer
from qwenlora.group import loader
from qwenlora.group.arena import BranchArena, PackedArena
from qwenlora.group.host_arena import HostFactor, HostPackedArena
from qwenlora.slots import packed
from qwenlora.slots.branch import SideBranchSlot
from qwenlora.slots.packed import PackedChange, PackedSlot
from qwenlora.work.jobs import Jobs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import pytest

FACTOR_COPY = (PackedSlot, "_joined")
HOST_BUFFER = (loader, "_host_buffer")
LOOK = (loader, "_look")
ALLOCATIONS = (
    FACTOR_COPY,
    (SideBranchSlot, "prepare"),
    (PackedArena, "_with_base"),
    (PackedArena, "write"),
    (HostFactor, "__init__"),
    (HostPackedArena, "write"),
    (BranchArena, "__init__"),
    (BranchArena, "write"),
    HOST_BUFFER,
    LOOK,
)
"""Each takes memory that may be short."""
POINTING = (packed, "point_all")
MAKE, UNMAKE = (PackedChange, "make"), (PackedChange, "unmake")
DONE, TO_BASE, UNDONE = (Journal, "done"), (Journal, "to_base"), (Journal, "undone")
PLACER, BUILD = (Placer, "__init__"), (Placer, "_build")
SUBMIT = (Jobs, "submit")
WRITTEN = (Journal, "write")
RESCALED = (rescale.Rescaling, "close")
REWRITE_PACKED = (rescale, "rewrite_packed")
WRITE_BRANCH_UPS = (rescale, "write_branch_ups")


def replace(
    patch: pytest.MonkeyPatch,
    points: Iterable[tuple[object, str]],
    make: Callable[[Callable], Callable],
) -> None:
    """Put `make(function)` in the place of each function, until the patch is undone."""
    for owner, name in points:
        patch.setattr(owner, name, make(getattr(owner, name)))


def before(act: Callable[[], None]) -> Callable[[Callable], Callable]:
    """Makes functions that first do `act`, which may raise."""

    def make(call):
        def called(*args, **options):
            act()
            return call(*args, **options)

        return called

    return make


def after(act: Callable[[], None]) -> Callable[[Callable], Callable]:
    """Makes functions that do `act` when they are done; it may raise."""

    def make(call):
        def called(*args, **options):
            call(*args, **options)
            act()

        return called

    return make


def instead(act: Callable) -> Callable[[Callable], Callable]:
    """Makes functions that do `act` alone."""
    return lambda _: lambda *args, **options: act(*args, **options)
