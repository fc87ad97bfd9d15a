"""The optional packages that the demo needs."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["MissingExtraError", "require"]


class MissingExtraError(ImportError):
    """diffusers or peft is missing, or too old for what the demo uses."""


def require(module: str, name: str) -> Any:
    """Import `name` from a module of diffusers or peft.

    Raises:
        MissingExtraError: It cannot be imported.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        # diffusers raises RuntimeError where a package that it imports lazily is missing.
        reason = str(error).strip().splitlines()[0]
        raise MissingExtraError(
            f'it needs diffusers and peft: run `pip install "qwenlora[demo]"`, or `qwenlora demo'
            f" --light`, which does without them ({reason})"
        ) from error
