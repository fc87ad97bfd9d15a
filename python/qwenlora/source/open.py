"""Opens what a caller gave as a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from qwenlora import _core
from qwenlora.errors import LoraFileError, LoraReadError
from qwenlora.source.file import FileSource
from qwenlora.source.state_dict import StateDictSource

if TYPE_CHECKING:
    from collections.abc import Hashable

    from qwenlora.source.source import LoraSource
    from qwenlora.spec import LoraSpec

__all__ = ["known_source", "open_source"]


def open_source(spec: LoraSpec, plans: _PlanCache, *, threads: int | None) -> LoraSource:
    """Plan what a spec names.

    Raises:
        LoraReadError: The file cannot be read.
        LoraFileError: It is not a well-formed safetensors file.
    """
    if isinstance(spec.source, _HasSource):
        return spec.source.source(spec.title)
    if isinstance(spec.source, Mapping):
        return StateDictSource(spec.source, spec.title)
    path = Path(spec.source)
    plan = _kept_plan(path, plans)
    if plan is None:
        plan = _core.FilePlan.read(path)
        plans.put(str(path), plan)
    return FileSource(path, plan, threads=threads)


def known_source(spec: LoraSpec, plans: _PlanCache, *, threads: int | None) -> LoraSource | None:
    """The file that a spec names, where its plan is kept; None for what `open_source` must read."""
    if isinstance(spec.source, Mapping):
        return None
    path = Path(spec.source)
    try:
        plan = _kept_plan(path, plans)
    except (LoraReadError, LoraFileError):
        # Whoever opens it says so in its turn.
        return None
    return None if plan is None else FileSource(path, plan, threads=threads)


def _kept_plan(path: Path, plans: _PlanCache) -> _core.FilePlan | None:
    return plans.get(str(path), _core.file_identity(path))


@runtime_checkable
class _HasSource(Protocol):
    """A state dict that knows more of itself than its tensors tell."""

    def source(self, name: str) -> LoraSource: ...


class _PlanCache(Protocol):
    def get(self, path: str, identity: Hashable) -> _core.FilePlan | None: ...

    def put(self, path: str, plan: _core.FilePlan) -> None: ...
