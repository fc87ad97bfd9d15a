"""The command that changes what is installed in an environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.doctor.mend import Run

if TYPE_CHECKING:
    from qwenlora.doctor.facts import Environment

__all__ = ["install", "uninstall"]


def install(environment: Environment, *what: str) -> Run:
    """Install packages."""
    return _run(environment, "install", *what)


def uninstall(environment: Environment, what: str) -> Run:
    """Uninstall a package, without asking."""
    return _run(environment, "uninstall", what)


def _run(environment: Environment, verb: str, *what: str) -> Run:
    python = str(environment.python)
    if environment.version_of("pip") is None and environment.fault is None:
        # An environment made by uv has no pip.
        return Run(("uv", "pip", verb, "--python", python, *what))
    sure = ("-y",) if verb == "uninstall" else ()
    return Run((python, *environment.flags, "-m", "pip", verb, *sure, *what))
