"""The sources' metadata: what the merged file keeps of them as its own, and what it only lists.

Entries on how a source's tensors are stored are untrue of the new file, and only listed. All
other entries of a single source are copied to the file. Of several sources an entry is copied where
all say the same; trigger phrases and tags are joined. Copied entries are not listed again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenlora import sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["METADATA", "PEFT_METADATA", "Inherited", "inherit"]

METADATA = "qwenlora.merge"
"""Entry of the file's metadata that says what it was made of."""
PEFT_METADATA = "lora_adapter_metadata"
"""Entry of the file's metadata that diffusers reads."""
_STORAGE = frozenset(
    (
        METADATA,
        PEFT_METADATA,
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
        "sshs_model_hash",
        "sshs_legacy_hash",
        "modelspec.hash_sha256",
    )
)
"""Entries that say how a source's tensors are stored, or what their bytes add up to."""
_JOINED = ("modelspec.trigger_phrase", "modelspec.tags")
"""Entries whose values are words with commas between them."""
_FORMAT = "format"
"""Every file has its own."""


@dataclass(frozen=True)
class Inherited:
    """The sources' metadata in a merged file, in their own words.

    Attributes:
        kept: Entries of the file's own metadata.
        listed: By source, the entries that are listed besides its name and strength.
        dropped: Entries that are too long for any place, as (source, entry).
    """

    kept: Mapping[str, str]
    listed: tuple[Mapping[str, str], ...]
    dropped: tuple[tuple[int, str], ...] = ()


def inherit(sources: Sequence[tuple[Mapping[str, str], float]]) -> Inherited:
    """Sort the metadata of all sources.

    Args:
        sources: Each source's metadata and its strength. What is subtracted lends no words.
    """
    same = dict(_same([metadata for metadata, _ in sources]))
    words = [metadata for metadata, strength in sources if strength > 0] if sources[1:] else []
    room = _Room()
    kept = {
        name: value
        for name, value in {**same, **dict(_joined(words))}.items()
        if room.takes(len(json.dumps({name: value})))
    }
    listed, dropped = [], []
    for at, (metadata, _) in enumerate(sources):
        own = {}
        for name, value in metadata.items():
            if name == _FORMAT or (name in same and name in kept):
                continue
            # A text within a document within a document.
            if room.takes(len(json.dumps(json.dumps({name: value})))):
                own[name] = value
            else:
                dropped.append((at, name))
        listed.append(own)
    return Inherited(kept, tuple(listed), tuple(dropped))


class _Room:
    """The rest of `Sizes.merge_metadata_bytes` that is not taken yet."""

    def __init__(self) -> None:
        self._left = sizes.current().merge_metadata_bytes

    def takes(self, size: int) -> bool:
        """Take this number of bytes if they still fit; tell if they did."""
        fits = size <= self._left
        self._left -= size if fits else 0
        return fits


def _same(sources: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """Entries that are true of the sum, as all sources have them with one value."""
    first, *others = sources
    for name, value in first.items():
        is_own = name != _FORMAT and name not in _STORAGE
        if is_own and all(other.get(name) == value for other in others):
            yield name, value


def _joined(sources: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """Entries that are lists of words: those of all sources, each once."""
    for name in _JOINED:
        words = (word.strip() for own in sources for word in own.get(name, "").split(","))
        joined = ", ".join(dict.fromkeys(word for word in words if word))
        if joined:
            yield name, joined
