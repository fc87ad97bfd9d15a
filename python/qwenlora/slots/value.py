"""Stored values of a layer: its bias, a norm's weight, an embedding's table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwenlora.delta.finite import is_finite, non_finite_in
from qwenlora.model.values import BASE_VALUES
from qwenlora.slots.point import point, point_back
from qwenlora.slots.slot import NoChange

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence
    from typing import Any

    from torch import Tensor

    from qwenlora.delta.slot_deltas import SlotDeltas
    from qwenlora.model.target import Target
    from qwenlora.slots.slot import Change

__all__ = ["BASE_VALUES", "PARAMETERS", "ValueSlot"]


PARAMETERS = ("weight", "bias")
"""Stored parameters that deltas may change."""


class ValueSlot:
    """Stored values of a layer: its bias, a norm's weight, an embedding's table.

    A parameter whose value changes is pointed at a new tensor; the base's is kept by the layer,
    where a deep copy of it takes its own along, and put back.
    """

    def __init__(self, target: Target, stored: Callable[[Tensor], Tensor] | None = None) -> None:
        """`stored` brings rows as in files to the layer's order; None where that is the same."""
        self._module = target.module
        self._names = tuple(target.prefix + name for name in PARAMETERS)
        self._prefix = target.prefix
        self._stored = stored
        self.path = target.path

    def rank_added(self) -> int:
        """Values hold no rank."""
        return 0

    def room(self) -> Hashable:
        """Swapped values have the base's shapes."""
        return ()

    def is_base(self) -> bool:
        """Tell if every parameter holds its base."""
        return not self._bases()

    def restore(self) -> None:
        """Point every parameter at its base again."""
        self._change({}).make()

    def prepare(self, deltas: SlotDeltas) -> Change:
        """Add the deltas to the base's values in float64 and round once.

        Raises:
            NonFiniteError: A value would be too large for the parameter's dtype.
        """
        return self._change(deltas.values) if deltas.values or self._bases() else NoChange()

    def _bases(self) -> dict[str, Tensor]:
        """The base's values of this layer: a fused module keeps those of several."""
        bases: dict[str, Tensor] = self._module.__dict__.get(BASE_VALUES, {})
        return {name: bases[name] for name in self._names if name in bases}

    def _change(self, deltas: Mapping[str, Tensor]) -> _ValueChange:
        values = {self._prefix + name: delta for name, delta in deltas.items()}
        bases = self._bases()
        new, kept = {}, {}
        for name in {**bases, **values}:
            current: Tensor = getattr(self._module, name)
            base = bases.get(name, current.data)
            # A parameter that is a normal one by then could not hold an inference tensor again.
            base = base.clone() if base.is_inference() else base
            # After a move of the model the base's tensor is where the parameter was.
            base = base.to(current.device, current.dtype)
            if name in values:
                kept[name] = base
                new[name] = self._sum(name, base, values[name], pinned=current.is_pinned())
            else:
                new[name] = base
        return _ValueChange(self._module, self._names, new=new, kept=kept)

    def _sum(self, name: str, base: Tensor, delta: Tensor, *, pinned: bool) -> Tensor:
        stored = delta if self._stored is None else self._stored(delta)
        total = (base.double().cpu() + stored.view(base.shape)).to(base.dtype)
        if not is_finite(total):
            raise non_finite_in(f"{self.path}.{name.removeprefix(self._prefix)}", base.dtype)
        return total.pin_memory() if pinned else total.to(base.device)


@dataclass
class _ValueChange:
    module: Any
    names: Sequence[str]
    new: dict[str, Tensor]
    kept: dict[str, Tensor]
    old: dict[str, tuple[Tensor, Tensor]] = field(init=False)
    old_kept: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.old = {
            name: (getattr(self.module, name), getattr(self.module, name).data) for name in self.new
        }
        bases: dict[str, Tensor] = self.module.__dict__.get(BASE_VALUES, {})
        self.old_kept = {name: bases[name] for name in self.names if name in bases}

    def make(self) -> None:
        self._record_every_base()
        for name, tensor in self.new.items():
            point(self.module, name, tensor)
        self._record(self.kept)

    def unmake(self) -> None:
        self._record_every_base()
        for name, (parameter, data) in self.old.items():
            point_back(self.module, name, parameter, data)
        self._record(self.old_kept)

    def _record_every_base(self) -> None:
        # Before a parameter leaves its base, which is forgotten after all parameters are back.
        self._record({**self.old_kept, **self.kept})

    def _record(self, kept: dict[str, Tensor]) -> None:
        bases: dict[str, Tensor] = self.module.__dict__.get(BASE_VALUES, {})
        kept = {**{name: own for name, own in bases.items() if name not in self.names}, **kept}
        if kept:
            self.module.__dict__[BASE_VALUES] = kept
        else:
            self.module.__dict__.pop(BASE_VALUES, None)
