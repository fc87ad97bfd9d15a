"""This package itself, its requirements, and copies of it that are in each other's way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.doctor.checks import pip
from qwenlora.doctor.facts import Environment, Facts, PackKind
from qwenlora.doctor.finding import Finding, Severity
from qwenlora.doctor.mend import Move
from qwenlora.doctor.version import release_of
from qwenlora.requirements import OLDEST

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CHECKS"]

_OLDEST_PYTHON = (3, 10)
_CHECKED_HERE = ("numpy", "safetensors")
"""Requirements; torch is one, too, and has checks of its own."""


def _asked(facts: Facts) -> Iterator[Finding]:
    for environment in facts.environments:
        if environment.fault is not None:
            yield Finding(
                severity=Severity.PROBLEM,
                code="python-silent",
                text=f"{environment.python} {environment.fault}: nothing is known of what is"
                " installed in it",
            )


def _python(facts: Facts) -> Iterator[Finding]:
    for environment in facts.environments:
        version = environment.version
        if version is not None and version < _OLDEST_PYTHON:
            yield Finding(
                severity=Severity.PROBLEM,
                code="python-old",
                text=f"{environment.python} is Python {version[0]}.{version[1]}: qwenlora and"
                " Nunchaku need 3.10 or newer",
            )


def _installed(facts: Facts) -> Iterator[Finding]:
    for environment in facts.environments:
        if environment.fault is not None:
            continue
        if environment.qwenlora and environment.has_core:
            version = environment.version_of("qwenlora") or "without metadata"
            yield Finding(
                severity=Severity.OK,
                code="qwenlora",
                text=f"qwenlora {version} in {environment.qwenlora[0]}",
            )
        elif environment.qwenlora:
            yield _without_core(environment)


def _without_core(environment: Environment) -> Finding:
    first = environment.qwenlora[0]
    if len(environment.qwenlora) > 1:
        return Finding(
            severity=Severity.PROBLEM,
            code="qwenlora-shadowed",
            text=f"`import qwenlora` in {environment.python} gives {first}, which is no installed"
            f" qwenlora, in place of {environment.qwenlora[1]}: a clone must not be named"
            " `qwenlora` where Python looks for packages",
            mends=(Move(first, first.with_name("ComfyUI-qwenlora")),),
        )
    return Finding(
        severity=Severity.PROBLEM,
        code="qwenlora-no-core",
        text=f"qwenlora in {first} lacks its Rust part: it was copied, not installed",
        mends=(pip.install(environment, "--force-reinstall", "--no-deps", "qwenlora"),),
    )


def _twice(facts: Facts) -> Iterator[Finding]:
    for environment in facts.environments:
        copies = [d for d in environment.distributions if d.name == "qwenlora"]
        if len(copies) > 1:
            where = " and ".join(f"{d.version} in {d.folder}" for d in copies)
            yield Finding(
                severity=Severity.PROBLEM,
                code="qwenlora-twice",
                text=f"qwenlora is installed {len(copies)} times for {environment.python}, and the"
                f" first wins: {where}",
                # One is removed at a time, the first found.
                mends=(
                    *(pip.uninstall(environment, "qwenlora") for _ in copies),
                    pip.install(environment, "qwenlora"),
                ),
            )


def _requirements(facts: Facts) -> Iterator[Finding]:
    for environment in facts.environments:
        for name in _CHECKED_HERE:
            needed, version = OLDEST[name], environment.version_of(name)
            # Where qwenlora is not wanted, nothing has to fit it.
            if not environment.qwenlora or (version and release_of(version) >= release_of(needed)):
                continue
            what = "is missing" if version is None else f"is {version}"
            yield Finding(
                severity=Severity.PROBLEM,
                code="requirement",
                text=f"{name} {what} in {environment.python}: qwenlora needs {needed} or newer",
                mends=(pip.install(environment, f"{name}>={needed}"),),
            )


def _clones(facts: Facts) -> Iterator[Finding]:
    for host in facts.hosts:
        clones = host.enabled(PackKind.QWENLORA)
        environment = facts.environment_of(host)
        if clones and not environment.qwenlora and environment.fault is None:
            yield Finding(
                severity=Severity.PROBLEM,
                code="qwenlora-no-wheel",
                text=f"{clones[0].path} holds the nodes, but the package itself is not installed"
                f" in {environment.python}: the nodes cannot be loaded",
                mends=(pip.install(environment, "qwenlora"),),
            )
        for clone in clones:
            places = environment.qwenlora
            if clone.path.name == "qwenlora" and places[:1] != (clone.path,):
                yield Finding(
                    severity=Severity.NOTE,
                    code="clone-name",
                    text=f"{clone.path} is named like the package: where another pack puts"
                    " custom_nodes on Python's path, or a program is started there, it hides the"
                    " installed one",
                    mends=(Move(clone.path, clone.path.with_name("ComfyUI-qwenlora")),),
                )


CHECKS = (_asked, _python, _installed, _twice, _requirements, _clones)
