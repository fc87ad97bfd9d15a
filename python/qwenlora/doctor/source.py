"""Reads Python files without running them."""

from __future__ import annotations

import ast
import re
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "arguments",
    "assigned_text",
    "imports_plainly",
    "mentions",
    "names",
    "project_version",
    "workspace_version",
]

_MAX_BYTES = 4 * 1024 * 1024


def names(path: Path) -> frozenset[str] | None:
    """The names that a module defines or imports at its top level; None where it has no text."""
    tree = _parse(path)
    return None if tree is None else frozenset(_names(tree.body))


def imports_plainly(path: Path, module: str, name: str) -> bool:
    """Tell if a file cannot be imported where `module` lacks `name`.

    An import inside `try` is not plain.
    """
    tree = _parse(path)
    plain = (node for node in (tree.body if tree else ()) if isinstance(node, ast.ImportFrom))
    return any(
        node.module == module and any(alias.name == name for alias in node.names) for node in plain
    )


def arguments(path: Path, class_name: str, *methods: str) -> tuple[str, ...] | None:
    """The positional arguments of the first of these methods that a class defines."""
    tree = _parse(path)
    for node in tree.body if tree else ():
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            found = {f.name: f for f in node.body if isinstance(f, ast.FunctionDef)}
            for method in methods:
                if method in found:
                    return tuple(a.arg for a in found[method].args.args)
    return None


def assigned_text(path: Path, name: str) -> str | None:
    """The text that a module assigns to a name."""
    tree = _parse(path)
    for node in tree.body if tree else ():
        if (
            isinstance(node, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            return node.value.value
    return None


def mentions(path: Path, text: str) -> bool:
    """Tell if a file holds a text."""
    return text in (_read(path) or "")


def project_version(folder: Path) -> str | None:
    """The version in the `[project]` table of a folder's `pyproject.toml`."""
    return _toml_version(folder / "pyproject.toml", "project")


def workspace_version(folder: Path) -> str | None:
    """The version in the `[workspace.package]` table of a folder's `Cargo.toml`."""
    return _toml_version(folder / "Cargo.toml", "workspace.package")


def _toml_version(path: Path, table: str) -> str | None:
    # By lines: Python 3.10 has no parser of TOML.
    in_table = False
    for line in (_read(path) or "").splitlines():
        if line.startswith("["):
            in_table = line.strip() == f"[{table}]"
        found = re.match(r"version\s*=\s*[\"']([^\"']+)[\"']", line) if in_table else None
        if found:
            return found[1]
    return None


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return None


def _parse(path: Path) -> ast.Module | None:
    text = _read(path)
    if text is None:
        return None
    try:
        with warnings.catch_warnings():
            # On escapes in somebody else's strings.
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _names(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        else:
            # The branches of `if` and `try`.
            for inner in ("body", "orelse", "finalbody"):
                yield from _names(getattr(node, inner, []))
