"""diffusers' own classes of 4-bit layers, with kernels in PyTorch.

diffusers loads compiled kernels from a server when its module is imported, and only for a GPU. So
the module's source is run a second time here, as a module of another name, without the statement
that loads them. Nothing of diffusers is changed, and its own module is not imported.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import types
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlora.emulation.lite_kernels import LiteKernels
from qwenlora.emulation.precision import Precision

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["layers_over", "lite_layers"]


_PACKAGE = "diffusers.quantizers.nunchaku"
_KERNELS = "ops"
"""The name under which diffusers' module holds its kernels."""


@cache
def lite_layers(precision: Precision) -> ModuleType:
    """The module of diffusers' layers, with kernels of this precision; see `layers_over`.

    Raises:
        ValueError: The precision is `NVFP4`.
    """
    if precision is Precision.NVFP4:
        raise ValueError("diffusers' layers are emulated with integers alone, not as nvfp4")
    return layers_over(LiteKernels(precision), name=precision.value)


def layers_over(kernels: object, *, name: str) -> ModuleType:
    """The module of diffusers' layers, over these kernels.

    Args:
        kernels: What the layers call, by the names of the kernels; see `LiteKernels`.
        name: Tells this module from those over other kernels.

    Returns:
        A module with `SVDQW4A4Linear`, `AWQW4A16Linear`, `replace_with_nunchaku_linear`.

    Raises:
        ImportError: diffusers is not installed, has no such layers, or builds them in a way that is
            not known.
    """
    path = _source()
    source = ast.parse(path.read_text(encoding="utf-8"), str(path))
    kept = [statement for statement in source.body if not _binds_kernels(statement)]
    if len(kept) != len(source.body) - 1:
        raise ImportError(f"{path} loads its kernels in a way that is not known")
    source.body = kept
    module = types.ModuleType(f"{__name__}.{name}")
    module.__package__ = _PACKAGE
    module.__file__ = str(path)
    module.__dict__[_KERNELS] = kernels
    # Pickles name a class by its module.
    sys.modules[module.__name__] = module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def _source() -> Path:
    spec = importlib.util.find_spec("diffusers")
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise ImportError("diffusers is not installed: `pip install 'diffusers>=0.40'`")
    path = Path(folders[0], "quantizers", "nunchaku", "utils.py")
    if not path.is_file():
        raise ImportError(
            "this diffusers has no 4-bit layers of its own: `pip install 'diffusers>=0.40'`"
        )
    return path


def _binds_kernels(statement: ast.stmt) -> bool:
    """Tell if a statement, or one inside it, assigns the kernels."""
    return any(
        isinstance(node, ast.Name) and node.id == _KERNELS and isinstance(node.ctx, ast.Store)
        for node in ast.walk(statement)
    )
