"""Finds ComfyUIs and reads what they and their node packs are, without running any of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlora.doctor import source
from qwenlora.doctor.facts import Host, Layout, Pack, PackKind, RotaryUse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["EMBEDDED", "find_roots", "gives_way", "read_host", "root_of"]

_ROTARY = "apply_rotary_emb"
_QWEN_MODULE = "comfy.ldm.qwen_image.model"
_QWEN_MODEL = Path("comfy", "ldm", "qwen_image", "model.py")
_DISABLED = ".disabled"
EMBEDDED = "python_embeded"
"""The portable build's Python, in its own spelling."""
_VENVS = (".venv", "venv")
_PYTHONS = (Path("Scripts", "python.exe"), Path("bin", "python"))


def find_roots(near: Iterable[Path]) -> tuple[Path, ...]:
    """The ComfyUIs that lie at, above, or next to places."""
    found = dict.fromkeys(root for place in near for root in _around(_absolute(place)))
    return tuple(found)


def root_of(path: Path) -> Path | None:
    """The ComfyUI that a user means by a path: it, one in it, or the one it lies in."""
    path = _absolute(path)
    inside = (path, path / "ComfyUI")
    return next((p for p in (*inside, *path.parents) if _layout(p) is not None), None)


def read_host(root: Path, current_python: Path) -> Host:
    """Read a ComfyUI; where no Python lies next to it, take this process's for its own."""
    model = root / _QWEN_MODEL
    own = _own_python(root)
    if own is not None and own.parent == current_python.parent:
        # `python` and `python3` of one environment.
        own = current_python
    names = source.names(model)
    updater = root.parent / "update" / "update_comfyui.bat"
    return Host(
        root=root,
        python=own or current_python,
        layout=_layout(root) or Layout.PLAIN,
        is_own_python=own is not None,
        version=source.assigned_text(root / "comfyui_version.py", "__version__"),
        is_git=(root / ".git").exists(),
        updater=updater if updater.is_file() else None,
        has_rotary=None if names is None else _ROTARY in names,
        takes_guidance=_takes_guidance(model, "QwenImageTransformer2DModel"),
        packs=tuple(_packs(root / "custom_nodes")),
    )


def gives_way(pack: Path) -> bool:
    """Tell if a folder is a clone of ours that lets the installed package have its name."""
    return "give_way" in (source.names(pack / "__init__.py") or ())


def _absolute(path: Path) -> Path:
    # Links stay: a pack that is linked into custom_nodes is found there, and a virtual
    # environment's Python is a link to another one.
    return Path(os.path.abspath(path.expanduser()))


def _around(place: Path) -> Iterator[Path]:
    for folder in (place, *place.parents):
        for root in (folder, folder / "ComfyUI"):
            if _layout(root) is not None:
                yield root


def _layout(root: Path) -> Layout | None:
    program = ("main.py", "nodes.py", "folder_paths.py", "comfy")
    if all((root / name).exists() for name in program):
        embedded = root.parent / EMBEDDED
        return Layout.PORTABLE if embedded.is_dir() else Layout.PLAIN
    if all((root / name).is_dir() for name in ("custom_nodes", "models", "user")):
        return Layout.BASE
    return None


def _own_python(root: Path) -> Path | None:
    candidates = [root.parent / EMBEDDED / "python.exe"]
    for folder in (root, root.parent):
        candidates += (folder / venv / python for venv in _VENVS for python in _PYTHONS)
    return next((python for python in candidates if python.is_file()), None)


def _packs(custom_nodes: Path) -> Iterator[Pack]:
    for path in _folders(custom_nodes):
        kind = _kind(path)
        if kind is None:
            continue
        model = path / "models" / "qwenimage.py"
        yield Pack(
            path=path,
            kind=kind,
            version=_version(path, kind),
            is_enabled=not path.name.endswith(_DISABLED) and path.parent == custom_nodes,
            is_git=(path / ".git").exists(),
            rotary=_rotary_use(path, kind),
            takes_guidance=_takes_guidance(model, "NunchakuQwenImageTransformer2DModel"),
            requirements=_if_file(path / "requirements.txt"),
            has_sources=_if_file(path / "Cargo.toml") is not None,
            gives_way=gives_way(path),
        )


def _folders(custom_nodes: Path) -> Sequence[Path]:
    # ComfyUI-Manager moves what it disables into a folder of that name.
    folders = []
    for folder in (custom_nodes, custom_nodes / _DISABLED):
        try:
            folders += sorted(p for p in folder.iterdir() if p.is_dir() and p.name != _DISABLED)
        except OSError:
            continue
    return folders


def _kind(path: Path) -> PackKind | None:
    def has(*names: str) -> bool:
        return all((path / name).is_file() for name in names)

    if has("comfy/qwenlora_nodes/registry.py") or has(
        "saved.py", "rows.py", "host.py", "registry.py"
    ):
        return PackKind.QWENLORA
    if has("models/qwenimage.py", "nodes/models/qwenimage.py"):
        return PackKind.COMFYUI_NUNCHAKU
    if has("nunchaku_code/lora_qwen.py"):
        return PackKind.OTHER_LOADER
    return None


def _version(path: Path, kind: PackKind) -> str | None:
    if kind is PackKind.QWENLORA:
        told = (source.assigned_text(p, "__version__") for p in _version_files(path))
        return next(filter(None, told), None) or source.workspace_version(path)
    return source.project_version(path)


def _version_files(path: Path) -> tuple[Path, ...]:
    """Where our nodes' version is: in the pack, or in the folder of the nodes alone."""
    return path / "comfy" / "qwenlora_nodes" / "version.py", path / "version.py"


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _rotary_use(path: Path, kind: PackKind) -> RotaryUse:
    if kind is PackKind.COMFYUI_NUNCHAKU:
        model = path / "models" / "qwenimage.py"
        needs = source.imports_plainly(model, _QWEN_MODULE, _ROTARY)
        return RotaryUse.NEEDS if needs else RotaryUse.NONE
    if kind is PackKind.OTHER_LOADER:
        # It has done so since 2.5; nothing but its text tells.
        supplies = source.mentions(path / "patches" / "nunchaku_patch.py", _ROTARY)
        return RotaryUse.SUPPLIES if supplies else RotaryUse.NONE
    return RotaryUse.NONE


def _takes_guidance(model: Path, class_name: str) -> bool | None:
    arguments = source.arguments(model, class_name, "_forward", "forward")
    return None if arguments is None else "guidance" in arguments
