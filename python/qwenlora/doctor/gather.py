"""Gathers the facts. Writes nothing, asks no network, imports nothing that it looks at."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlora.doctor import gpus, hosts, packages, probe
from qwenlora.doctor.facts import Environment, Facts, Host, System
from qwenlora.doctor.fitting import fault_of
from qwenlora.doctor.mend import Shell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["environment", "gather_facts"]


def gather_facts(comfyui: Sequence[Path], talk: Callable[[str], None]) -> Facts:
    """Look at this process's environment, and at the ComfyUIs that are given or lie nearby.

    Args:
        comfyui: Roots of ComfyUIs; where there are none, one is looked for nearby.
        talk: Told what takes time.
    """
    current_python = Path(sys.executable)
    talk(f"asking {current_python} for its torch")
    current = environment(current_python, is_current=True)
    roots = comfyui or hosts.find_roots(_nearby(current))
    found = tuple(hosts.read_host(root, current_python) for root in roots)
    environments = [current]
    for python in _other_pythons(found, current_python):
        talk(f"asking {python} for its torch")
        environments.append(environment(python))
    return Facts(
        system=System(
            name=platform.system(),
            release=platform.release(),
            machine=platform.machine(),
            shell=Shell.current(),
        ),
        environments=tuple(environments),
        gpus=gpus.driver_gpus() or next((e.torch.gpus for e in environments if e.torch), ()),
        hosts=found,
    )


def environment(python: Path, *, is_current: bool = False) -> Environment:
    """Look at the environment of a Python."""
    is_embedded = python.parent.name == hosts.EMBEDDED
    flags = ("-s",) if is_embedded or (is_current and sys.flags.no_user_site) else ()
    answer = probe.ask(python, flags)
    # The working folder counts for the program that is started in it, not for a host's.
    here = [str(folder) for folder in _working_folder()] if is_current else []
    entries = [path for entry in answer.paths for path in ([entry] if entry else here)]
    paths = tuple(Path(entry) for entry in entries)
    places = packages.import_places("qwenlora", paths)
    qwenlora = tuple(place for place in places if not hosts.gives_way(place))
    has_core = bool(qwenlora) and packages.has_extension(qwenlora[0], "_core")
    interpreter = answer.interpreter
    return Environment(
        python=python,
        flags=flags,
        version=answer.version,
        is_current=is_current,
        fault=answer.fault,
        distributions=packages.distributions(paths),
        torch=answer.torch,
        nunchaku=packages.nunchaku_kind(paths),
        interpreter=interpreter,
        qwenlora=qwenlora,
        has_core=has_core,
        core_fault=fault_of(qwenlora[0], interpreter) if has_core and interpreter else "",
    )


def _nearby(current: Environment) -> Iterable[Path]:
    """Places at, above or next to which a ComfyUI may lie."""
    yield from _working_folder()
    # The embedded Python of the portable build, or a virtual environment inside of ComfyUI.
    yield Path(sys.prefix)
    yield from (place.parent for place in current.qwenlora)
    home = Path.home()
    yield home / "ComfyUI"
    yield home / "Documents" / "ComfyUI"


def _working_folder() -> tuple[Path, ...]:
    """The working folder; nothing where it has been deleted."""
    try:
        return (Path.cwd(),)
    except FileNotFoundError:
        return ()


def _other_pythons(found: Sequence[Host], current: Path) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(h.python for h in found if h.python != current))
