"""The models that replicas can load; each is loaded by a module of its own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..settings import PipelineKind

if TYPE_CHECKING:
    from .studio import Studio

__all__ = ["load_studio"]


def load_studio(kind: PipelineKind) -> Studio:
    """Load a model, which may take minutes."""
    # Imported now: what one model needs, such as Nunchaku, another one does not.
    module = importlib.import_module(f"{__name__}.{kind.value}")
    studio: Studio = module.load()
    return studio
