"""This package itself, its requirements, and copies of it that are in each other's way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.doctor.checks import pip
from qwenlora.doctor.facts import Environment, Facts, Pack, PackKind
from qwenlora.doctor.finding import Finding, Severity
from qwenlora.doctor.fitting import fit_of
from qwenlora.doctor.mend import Move, Run
from qwenlora.doctor.version import release_of
from qwenlora.requirements import OLDEST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenlora.doctor.mend import Mend

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
        if environment.fault is not None or not environment.qwenlora:
            continue
        if environment.core_fault:
            advice, mends = _installing_again(facts, environment)
            yield Finding(
                severity=Severity.PROBLEM,
                code="qwenlora-broken",
                text=f"{environment.core_fault}{advice}",
                mends=mends,
            )
        elif environment.has_core:
            version = environment.version_of("qwenlora") or "without metadata"
            yield Finding(
                severity=Severity.OK,
                code="qwenlora",
                text=f"qwenlora {version} in {environment.qwenlora[0]}",
            )
        elif len(environment.qwenlora) > 1:
            yield _shadowed(facts, environment)
        else:
            advice, mends = _installing_again(facts, environment)
            yield Finding(
                severity=Severity.PROBLEM,
                code="qwenlora-no-core",
                text=f"qwenlora lacks its Rust part, in {environment.qwenlora[0]}{advice}",
                mends=mends,
            )


def _shadowed(facts: Facts, environment: Environment) -> Finding:
    first, second = environment.qwenlora[:2]
    packs = [pack.path for host in facts.hosts for pack in host.enabled(PackKind.QWENLORA)]
    return Finding(
        severity=Severity.PROBLEM,
        code="qwenlora-shadowed",
        text=f"`import qwenlora` in {environment.python} gives {first}, which is no installed"
        f" qwenlora, in place of {second}: give that folder another name",
        # Another's folder is not ours to rename.
        mends=(Move(first, first.with_name("ComfyUI-qwenlora")),) if first in packs else (),
    )


def _installing_again(facts: Facts, environment: Environment) -> tuple[str, tuple[Mend, ...]]:
    """What replaces a package that cannot be loaded; where nodes need it, as they have it."""
    pack = next((pack for own, pack in _packs(facts) if own is environment), None)
    return _installing(environment, pack, "--force-reinstall", "--no-deps")


def _installing(
    environment: Environment, pack: Pack | None, *options: str
) -> tuple[str, tuple[Mend, ...]]:
    """Which wheel fits an environment, as a sentence after another, and what installs it.

    A stub of the nodes says the same.
    """
    what: tuple[str, ...] = ("qwenlora",)
    if pack is not None and pack.requirements is not None:
        what = ("-r", str(pack.requirements))
    mend = pip.install(environment, *options, *what)
    if environment.interpreter is None:
        return "", (mend,)
    version = (pack and pack.version) or environment.version_of("qwenlora") or "*"
    fit = fit_of(environment.interpreter, version)
    if fit.is_built:
        source = str(pack.path) if pack is not None and pack.has_sources else "qwenlora"
        mend = pip.install(environment, *options, source)
    return f". {fit.text}", (mend,) if fit.file or fit.is_built else ()


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


def _packs(facts: Facts) -> Iterator[tuple[Environment, Pack]]:
    """Our packs, each with the environment that it runs in."""
    for host in facts.hosts:
        for pack in host.enabled(PackKind.QWENLORA):
            yield facts.environment_of(host), pack


def _nodes_without_wheel(facts: Facts) -> Iterator[Finding]:
    seen = set()
    for environment, pack in _packs(facts):
        if environment.qwenlora or environment.fault is not None or environment.python in seen:
            continue
        seen.add(environment.python)
        advice, mends = _installing(environment, pack)
        text = f"{pack.path} holds the nodes, but qwenlora is not installed in {environment.python}"
        yield Finding(
            severity=Severity.PROBLEM,
            code="qwenlora-no-wheel",
            text=f"{text}: the nodes cannot run{advice}",
            mends=mends,
        )


def _versions(facts: Facts) -> Iterator[Finding]:
    for environment, pack in _packs(facts):
        version = environment.version_of("qwenlora") if environment.qwenlora else None
        if version is None or pack.version is None:
            continue
        said = f"the nodes in {pack.path} are {pack.version}, qwenlora in {environment.python} is"
        if release_of(version) < release_of(pack.version):
            advice, mends = _installing(environment, pack, "--upgrade", "--no-deps")
            yield Finding(
                severity=Severity.PROBLEM,
                code="qwenlora-older",
                text=f"{said} {version}: it may lack what they need{advice}",
                mends=mends,
            )
        elif release_of(version) > release_of(pack.version):
            yield Finding(
                severity=Severity.NOTE,
                code="qwenlora-newer",
                text=f"{said} {version}: update the nodes, too, for what is new",
                mends=(Run(("git", "-C", str(pack.path), "pull")),) if pack.is_git else (),
            )


def _clone_names(facts: Facts) -> Iterator[Finding]:
    for environment, pack in _packs(facts):
        if pack.path.name != "qwenlora" or pack.gives_way:
            continue
        if environment.qwenlora[:1] == (pack.path,):
            continue
        yield Finding(
            severity=Severity.NOTE,
            code="clone-name",
            text=f"{pack.path} is named like the package: where another pack puts custom_nodes on"
            " Python's path, or a program is started there, it hides the installed one. Newer"
            " versions of the nodes do not",
            mends=(Move(pack.path, pack.path.with_name("ComfyUI-qwenlora")),),
        )


CHECKS = (
    _asked,
    _python,
    _installed,
    _twice,
    _requirements,
    _nodes_without_wheel,
    _versions,
    _clone_names,
)
