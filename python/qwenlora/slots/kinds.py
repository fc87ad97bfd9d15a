"""The table of layer kinds. A new kind is a new file and a row here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.slots.awq import AWQ
from qwenlora.slots.embedding import EMBEDDING
from qwenlora.slots.linear import LINEAR
from qwenlora.slots.norm import NORM
from qwenlora.slots.svdq import SVDQ

if TYPE_CHECKING:
    from qwenlora.plan.documents import SlotKind
    from qwenlora.slots.kind import LayerKind

__all__ = ["KINDS"]

KINDS: dict[SlotKind, LayerKind] = {
    kind.kind: kind for kind in (SVDQ, AWQ, LINEAR, EMBEDDING, NORM)
}
"""All kinds by name, in the order in which a module is asked for them."""
