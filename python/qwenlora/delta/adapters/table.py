"""The table of adapters. A new adapter is a file of its own and a row here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.delta.adapters.adapter import unknown_adapter
from qwenlora.delta.adapters.full import FULL
from qwenlora.delta.adapters.loha import LOHA
from qwenlora.delta.adapters.lokr import LOKR
from qwenlora.delta.adapters.pair import LORA

if TYPE_CHECKING:
    from qwenlora.delta.adapters.adapter import Adapter

__all__ = ["ADAPTERS", "adapter_named"]


ADAPTERS: dict[str, Adapter] = {adapter.name: adapter for adapter in (LORA, LOKR, LOHA, FULL)}
"""All adapters of weights by name. What is added to stored values is `vector`'s."""


def adapter_named(name: str) -> Adapter:
    """The adapter of this name.

    Raises:
        UnsupportedAdapterError: There is none: a plan has a piece that nothing here can execute.
    """
    adapter = ADAPTERS.get(name)
    if adapter is None:
        raise unknown_adapter(name, "a weight")
    return adapter
