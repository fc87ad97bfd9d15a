"""Imports run one way: between modules and between folders, those for types alone included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import qwenlora

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PACKAGE = Path(qwenlora.__file__).parent


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file names in an import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def imports() -> dict[str, set[str]]:
    """Each module's imports; the package itself, which hands names on, is left out."""
    own = {
        name: {other for other in imported(path) if other in MODULES and other != name}
        for name, path in MODULES.items()
    }
    del own["qwenlora"]
    return {name: others - {"qwenlora"} for name, others in own.items()}


def part_of(module: str) -> str:
    """A folder of the package, or a module that lies in none."""
    return module.split(".")[1]


def require_one_way(graph: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_modules_import_one_way():
    graph = imports()
    assert sum(map(len, graph.values())) > 300
    require_one_way(graph)


def test_folders_import_one_way():
    folders: dict[str, set[str]] = {}
    for module, others in imports().items():
        own = part_of(module)
        folders.setdefault(own, set()).update({part_of(other) for other in others} - {own})
    assert "compose" not in folders["delta"]
    require_one_way(folders)


def test_no_private_name_crosses_a_file():
    crossing = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qwenlora."):
                crossing += [(name, a.name) for a in node.names if a.name.startswith("_")]
    # `_core` is the extension itself; `_reference` and `_version` are files.
    assert [own for own in crossing if own[1] not in ("_core", "_reference", "__version__")] == []


def test_a_cycle_is_found():
    with pytest.raises(pytest.fail.Exception, match=r"a -> b -> a|b -> a -> b"):
        require_one_way({"a": {"b"}, "b": {"a"}})
