"""The facts of a machine, as plain immutable values; no judgement here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from qwenlora.doctor.fitting import Interpreter
    from qwenlora.doctor.mend import Shell

__all__ = [
    "Capability",
    "Distribution",
    "Environment",
    "Facts",
    "Gpu",
    "Host",
    "Layout",
    "NunchakuKind",
    "Pack",
    "PackKind",
    "RotaryUse",
    "System",
    "Torch",
]

Capability = tuple[int, int]
"""A GPU's compute capability: (8, 9) is sm_89."""


@dataclass(frozen=True, kw_only=True)
class System:
    """The operating system and the shell that commands are written for."""

    name: str
    release: str
    machine: str
    shell: Shell


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU."""

    name: str
    capability: Capability
    memory_bytes: int
    driver: str | None = None


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """An installed package, as its metadata names it; `folder` is where the metadata lies."""

    name: str
    version: str
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Torch:
    """The result of importing torch.

    Attributes:
        version: With its local part, as in `2.9.1+cu128`.
        cuda: The CUDA version that it is built for, or None.
        is_available: Whether it can use a GPU now.
        warning: What it said when asked whether it can.
        error: Why it cannot be imported; then the rest says nothing.
    """

    version: str = ""
    cuda: str | None = None
    is_available: bool = False
    gpus: tuple[Gpu, ...] = ()
    warning: str | None = None
    error: str | None = None


class NunchakuKind(Enum):
    """The package that the name `nunchaku` stands for, recognized by its files."""

    ABSENT = "absent"
    ENGINE = "engine"
    """The inference engine, with its extension."""
    NO_EXTENSION = "no extension"
    """The engine's Python part alone."""
    IMPOSTOR = "impostor"
    """Another package of that name: PyPI's, on piece-wise linear functions."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A Python with what is installed in it.

    Attributes:
        python: Its executable.
        flags: What it is started with: the portable build keeps out the user's own packages.
        version: Its version; None where it could not be asked.
        is_current: Whether this process runs in it.
        fault: Why it could not be asked.
        distributions: Packages by metadata, in the order of its path; a name may occur twice.
        torch: None where it is not installed, or the environment could not be asked.
        nunchaku: Which `nunchaku` an import would give.
        interpreter: What decides which wheels it can load; None where it did not tell.
        qwenlora: Folders named `qwenlora` that an import could give, the first wins. A clone of
            that name gives way and is left out.
        has_core: Whether the first of them has a Rust part.
        core_fault: Why that cannot be loaded, as far as files tell; or empty.
    """

    python: Path
    flags: tuple[str, ...] = ()
    version: tuple[int, int] | None = None
    is_current: bool = False
    fault: str | None = None
    distributions: tuple[Distribution, ...] = ()
    torch: Torch | None = None
    nunchaku: NunchakuKind = NunchakuKind.ABSENT
    interpreter: Interpreter | None = None
    qwenlora: tuple[Path, ...] = ()
    has_core: bool = False
    core_fault: str = ""

    def version_of(self, name: str) -> str | None:
        """The version of an installed package; its name in lower case, with hyphens."""
        return next((d.version for d in self.distributions if d.name == name), None)


class PackKind(Enum):
    """Node packs that matter here, recognized by their files, whatever their folder is called."""

    QWENLORA = "qwenlora"
    COMFYUI_NUNCHAKU = "ComfyUI-nunchaku"
    OTHER_LOADER = "ComfyUI-QwenImageLoraLoader"


class RotaryUse(Enum):
    """A pack's use of `apply_rotary_emb` from ComfyUI's Qwen-Image model."""

    NONE = "none"
    NEEDS = "needs"
    """Imports it: where ComfyUI has it not, the pack's Qwen loader is missing."""
    SUPPLIES = "supplies"
    """Puts it into ComfyUI where it is missing."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A node pack in `custom_nodes`.

    Attributes:
        is_enabled: ComfyUI passes over folders that end in `.disabled`.
        is_git: Whether it is a clone.
        takes_guidance: Whether its Qwen-Image model takes the argument `guidance`, as ComfyUI's
            did before 0.6; None where that is unknown.
        requirements: The file that pip installs its requirements from.
        has_sources: Whether it is our repository, whole: the package can be built from it.
        gives_way: Whether it lets the installed package have the name `qwenlora`.
    """

    path: Path
    kind: PackKind
    version: str | None = None
    is_enabled: bool = True
    is_git: bool = False
    rotary: RotaryUse = RotaryUse.NONE
    takes_guidance: bool | None = None
    requirements: Path | None = None
    has_sources: bool = False
    gives_way: bool = False


class Layout(Enum):
    """The way in which a ComfyUI is installed."""

    PLAIN = "plain"
    PORTABLE = "portable"
    """The Windows archive: `ComfyUI` next to `python_embeded` and `update`."""
    BASE = "base folder"
    """Models and node packs only; the program itself lies elsewhere, as with the desktop app."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A ComfyUI.

    Attributes:
        python: The executable of the environment that it runs in.
        is_own_python: Whether that one lies next to it; otherwise it is this process's.
        updater: The portable build's update script.
        has_rotary: Whether its Qwen-Image model has `apply_rotary_emb`; None where there is no
            such model or no program.
        takes_guidance: As for a pack.
    """

    root: Path
    python: Path
    layout: Layout = Layout.PLAIN
    is_own_python: bool = False
    version: str | None = None
    is_git: bool = False
    updater: Path | None = None
    has_rotary: bool | None = None
    takes_guidance: bool | None = None
    packs: tuple[Pack, ...] = ()

    def enabled(self, kind: PackKind) -> tuple[Pack, ...]:
        """The packs of a kind that ComfyUI loads."""
        return tuple(p for p in self.packs if p.kind is kind and p.is_enabled)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that was found; the first environment is the current one."""

    system: System
    environments: tuple[Environment, ...]
    gpus: tuple[Gpu, ...] = ()
    hosts: tuple[Host, ...] = ()

    @property
    def current(self) -> Environment:
        """The environment of this process."""
        return self.environments[0]

    def environment_of(self, host: Host) -> Environment:
        """The environment that a host runs in."""
        return next((e for e in self.environments if e.python == host.python), self.current)
