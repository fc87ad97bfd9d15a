"""Options that the version at hand may lack."""

from __future__ import annotations

from dataclasses import fields

import qwenlora

MIB = 1 << 20
BOUNDED = {"staging_bytes": 64 * MIB}
"""Composing through little device memory, beside what is kept."""

BY_PATH = {
    "placement": qwenlora.Placement.BY_PATH,
    "staging_bytes": 32 * MIB,
    "cache_bytes": 0,
    "device_cache_bytes": 0,
}
"""Composing within little memory: the old set is let go path by path, and nothing is kept."""

HOST_PIECES = {"cache_bytes": 8 << 30, "device_cache_bytes": 0}
"""Pieces of recent LoRAs kept in host memory only."""

DEVICE_PIECES = {"cache_bytes": 0, "device_cache_bytes": 8 << 30}
"""Pieces of recent LoRAs kept on the device."""

_KNOWN = {field.name for field in fields(qwenlora.ComposeOptions)}


class UnavailableError(Exception):
    """This version has no such option, or this system no such means."""


def options(**wanted: object) -> qwenlora.ComposeOptions:
    """The options.

    Raises:
        UnavailableError: One is not known.
    """
    missing = [name for name in wanted if name not in _KNOWN]
    if missing:
        raise UnavailableError(f"no option `{missing[0]}` in this version")
    return qwenlora.ComposeOptions(**wanted)
