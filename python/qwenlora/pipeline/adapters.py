"""The adapters of a transformer by name, as a value: loaded, active, enabled."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qwenlora.errors import AdapterNameError
from qwenlora.lora_set import LoraSet

if TYPE_CHECKING:
    from qwenlora.pipeline.adapter import Adapter
    from qwenlora.pipeline.weight import Weight
    from qwenlora.spec import ComposeOptions, MaxRank

__all__ = ["NO_ADAPTERS", "Adapters", "names_in", "once_each"]

_log = logging.getLogger("qwenlora")


@dataclass(frozen=True, eq=False)
class Adapters:
    """All that PEFT keeps of its adapters in a model's layers; every change gives another value.

    Attributes:
        loaded: Adapters by name, in the order in which they were loaded.
        active: Names of those that are composed, in the order in which they were asked for.
        enabled: False while all are turned off.
    """

    loaded: Mapping[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True

    def free_name(self) -> str:
        """A name for an adapter without one: `default_` and how many are loaded.

        Where that is taken, after others were deleted, the next number that is free.
        """
        number = len(self.loaded)
        while f"default_{number}" in self.loaded:
            number += 1
        return f"default_{number}"

    def with_loaded(self, adapter: Adapter) -> Adapters:
        """Add an adapter, which alone becomes active.

        Raises:
            AdapterNameError: Its name is taken.
        """
        self.require_free(adapter.name)
        loaded = {**self.loaded, adapter.name: adapter}
        return replace(self, loaded=loaded, active=(adapter.name,))

    def with_swapped(self, adapter: Adapter) -> Adapters:
        """Put an adapter in the place of the one of its name, active as that was.

        Raises:
            AdapterNameError: There is none.
        """
        self.require_known([adapter.name])
        return replace(self, loaded={**self.loaded, adapter.name: adapter})

    def activated(self, weights: Mapping[str, Weight]) -> Adapters:
        """Make these, in this order and with these weights, the active ones.

        Raises:
            AdapterNameError: A name is not known.
            AdapterWeightError: A weight cannot be carried out.
        """
        self.require_known(weights)
        weighted = {
            name: replace(self.loaded[name], weight=weight) for name, weight in weights.items()
        }
        return replace(self, loaded={**self.loaded, **weighted}, active=tuple(weights))

    def chosen(self, names: Sequence[str]) -> Adapters:
        """Make these the active ones, with the weights that they have.

        Raises:
            AdapterNameError: A name is not known, or there is none at all.
        """
        self.require_any()
        self.require_known(names)
        return replace(self, active=tuple(names))

    def turned(self, *, on: bool) -> Adapters:
        """Turn all on or off; which are active stays."""
        return replace(self, enabled=on)

    def without(self, names: Iterable[str]) -> Adapters:
        """Delete adapters; a name that is not known is passed over, as PEFT does.

        Where none of the active ones is left, the first of the others by name becomes active.
        """
        gone = set(names)
        loaded = {name: own for name, own in self.loaded.items() if name not in gone}
        active = tuple(name for name in self.active if name not in gone)
        if self.active and not active and loaded:
            active = (min(loaded),)
            _log.warning("the active adapters are deleted: `%s` is active now", active[0])
        return replace(self, loaded=loaded, active=active)

    def wanted(self, max_rank: MaxRank, options: ComposeOptions) -> LoraSet:
        """The set of the active adapters; the base where they are turned off."""
        active = [self.loaded[name] for name in self.active] if self.enabled else []
        pairs = [(spec, adapter.source) for adapter in active for spec in adapter.weighted]
        return LoraSet(
            tuple(spec for spec, _ in pairs),
            tuple(source for _, source in pairs),
            max_rank,
            options,
        )

    def require_free(self, name: str) -> None:
        """Raise `AdapterNameError` where a name is taken."""
        if name in self.loaded:
            raise AdapterNameError(
                f"adapter name `{name}` is already in use"
                "\nhint: choose another, or pass hotswap=True to put this one in its place"
            )

    def require_known(self, names: Iterable[str]) -> None:
        """Raise `AdapterNameError` where a name is not loaded."""
        missing = [name for name in names if name not in self.loaded]
        if missing:
            raise AdapterNameError(
                f"adapter name(s) {missing} not in the list of present adapters:"
                f" {list(self.loaded)}"
            )

    def require_any(self) -> None:
        """Raise `AdapterNameError` where nothing is loaded."""
        if not self.loaded:
            raise AdapterNameError("no adapter is loaded\nhint: load one first")


NO_ADAPTERS = Adapters()
"""Nothing loaded."""


def names_in(names: object) -> list[str]:
    """Bring one name or several to a list.

    Raises:
        TypeError: They are no names.
        AdapterNameError: A name is empty.
    """
    listed = []
    for name in [names] if isinstance(names, str) else _iterable(names):
        if not isinstance(name, str):
            raise TypeError(f"an adapter's name is text, not {type(name).__name__}")
        if not name:
            raise AdapterNameError("an adapter's name is empty")
        listed.append(name)
    return listed


def once_each(names: Sequence[str]) -> Sequence[str]:
    """The names, where none is there twice.

    Raises:
        AdapterNameError: One is.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AdapterNameError(
            f"{twice} named twice\nhint: name each adapter once, and add up the weights"
        )
    return names


def _iterable(names: object) -> Iterable[object]:
    if not isinstance(names, Iterable):
        raise TypeError(f"adapter names are text or a list of it, not {type(names).__name__}")
    return names
