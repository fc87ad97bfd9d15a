"""Stand-ins for nodes that cannot run: they look like them, and say why they refuse to.

A workflow that is opened and saved meanwhile loses nothing. `shapes.json` is what the nodes tell
ComfyUI of themselves; `make shapes` writes it. Needs ComfyUI alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FAULT", "FILES", "SHAPES", "Stub", "read_shapes", "stub_of"]

SHAPES = Path(__file__).parent / "shapes.json"

FILES = "files"
"""The one key of what stands in a shape where the nodes list the files of one of ComfyUI's folders;
its value is the folder's name."""


FAULT = "qwenlora_fault"
"""An option of a stub's first input: why it cannot run."""


class _Choices(list):  # type: ignore[type-arg]
    """Choices of which the server takes any: what is wrong is said once, and nothing else."""

    def __contains__(self, value: object) -> bool:
        return True


class _Options(dict):  # type: ignore[type-arg]
    """Options of an input whose limits the server does not find; pages do."""

    def __contains__(self, key: object) -> bool:
        return False


class _Kind(str):
    """The type of a widget whose values the server leaves as they are."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


class Stub:
    """A node that cannot run.

    Attributes:
        shape: What it tells of itself: "class", its attributes, and its inputs by their groups.
        fault: Why it cannot run, and what to do.
    """

    shape: Mapping[str, Any]
    fault: str
    FUNCTION = "refuse"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs that the host draws."""
        groups = {
            group: {name: _input(spec) for name, spec in inputs.items()}
            for group, inputs in cls.shape.items()
            if group != "class"
        }
        # Our part in the browser shows it on the node.
        _, options = next(iter(groups["required"].values()))
        options[FAULT] = cls.fault
        return groups

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: object) -> str:
        """Say why it cannot run.

        The server says it once for each argument here. It always has this one.
        """
        del input_types
        return cls.fault

    def refuse(self, **inputs: object) -> None:
        """Say it where another node has put this one into a running workflow.

        Raises:
            RuntimeError: Always.
        """
        del inputs
        raise RuntimeError(self.fault)


def read_shapes() -> dict[str, dict[str, Any]]:
    """The shapes of all nodes by their ids."""
    shapes: dict[str, dict[str, Any]] = json.loads(SHAPES.read_text(encoding="utf-8"))
    return shapes


def stub_of(node_id: str, shape: Mapping[str, Any], fault: str) -> type[Stub]:
    """The class that stands in for a node."""
    return type(node_id, (Stub,), {"shape": shape, "fault": fault, **shape["class"]})


def _input(spec: list[Any]) -> tuple[Any, ...]:
    """An input as the host wants it, with the files that are there now."""
    kind, *options = _with_files(spec)
    drawn = _Choices(kind) if isinstance(kind, list) else _Kind(kind)
    return (drawn, *map(_Options, options))


def _with_files(value: Any) -> Any:
    if isinstance(value, list):
        filled: list[Any] = []
        for own in value:
            if isinstance(own, dict) and own.keys() == {FILES}:
                filled += folder_paths.get_filename_list(own[FILES])
            else:
                filled.append(_with_files(own))
        return filled
    if isinstance(value, dict):
        return {key: _with_files(own) for key, own in value.items()}
    return value
