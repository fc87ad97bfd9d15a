"""Which `nunchaku` is installed, and whether it fits its torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qwenlora.doctor import wheels
from qwenlora.doctor.checks import pip
from qwenlora.doctor.checks import torch as torch_checks
from qwenlora.doctor.checks.gpu import precision_of
from qwenlora.doctor.facts import Environment, Facts, NunchakuKind, PackKind, System, Torch
from qwenlora.doctor.finding import Finding, Severity
from qwenlora.doctor.version import cuda_of, local_of, release_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenlora.doctor.mend import Mend

__all__ = ["CHECKS"]

_OLDEST = (1, 0, 0)
# What the engine's package imports on its way to the layers, from version 1.2 on.
_NEEDS = {"diffusers": (0, 36), "peft": (0, 17)}


def _nunchaku(facts: Facts) -> Iterator[Finding]:
    for environment in facts.environments:
        if environment.fault is None:
            yield from _judge(facts, environment)


def _judge(facts: Facts, environment: Environment) -> Iterator[Finding]:
    mends = _installing(facts.system, environment)
    if environment.nunchaku is NunchakuKind.ENGINE:
        yield from _judge_engine(facts, environment, mends)
        return
    if environment.nunchaku is NunchakuKind.ABSENT:
        yield _without_wheel(facts, environment) or _absent(facts, environment, mends)
        return
    yield _useless(environment, mends)
    no_wheel = _without_wheel(facts, environment)
    if no_wheel is not None:
        yield no_wheel


def _useless(environment: Environment, mends: tuple[Mend, ...]) -> Finding:
    """A package of the name that is not the engine, or not all of it."""
    mends = (pip.uninstall(environment, "nunchaku"), *mends)
    if environment.nunchaku is NunchakuKind.IMPOSTOR:
        version = environment.version_of("nunchaku") or "of unknown version"
        return Finding(
            severity=Severity.PROBLEM,
            code="nunchaku-impostor",
            text=f"`nunchaku` {version} in {environment.python} is not the inference engine but"
            " PyPI's package of that name, on piece-wise linear functions: `pip install nunchaku`"
            " installs it. The engine comes as a wheel from its own releases",
            mends=mends,
        )
    return Finding(
        severity=Severity.PROBLEM,
        code="nunchaku-no-extension",
        text=f"nunchaku in {environment.python} lacks its compiled part `nunchaku._C`: it was"
        " copied, or its build failed",
        mends=mends,
    )


def _absent(facts: Facts, environment: Environment, mends: tuple[Mend, ...]) -> Finding:
    hosts = [h for h in facts.hosts if h.python == environment.python]
    wanting = [h for h in hosts if h.enabled(PackKind.COMFYUI_NUNCHAKU)]
    if wanting:
        return Finding(
            severity=Severity.PROBLEM,
            code="nunchaku-missing",
            text=f"{wanting[0].enabled(PackKind.COMFYUI_NUNCHAKU)[0].path} needs nunchaku, which"
            f" is not installed in {environment.python}: its loaders are missing",
            mends=mends,
        )
    return Finding(
        severity=Severity.NOTE,
        code="nunchaku-missing",
        text=f"nunchaku is not installed in {environment.python}: its models cannot be loaded"
        " there",
        mends=mends,
    )


def _judge_engine(
    facts: Facts, environment: Environment, mends: tuple[Mend, ...]
) -> Iterator[Finding]:
    version = environment.version_of("nunchaku") or ""
    named = f"nunchaku {version or 'without metadata'} in {environment.python}"
    yield from _missing_needs(environment, named)
    if release_of(version) and release_of(version) < _OLDEST:
        yield Finding(
            severity=Severity.PROBLEM,
            code="nunchaku-old",
            text=f"{named} is older than 1.0.0, the first with Qwen-Image",
            mends=mends,
        )
        return
    misfit = _misfit(version, environment.torch) if environment.torch else None
    if misfit is not None:
        yield _without_wheel(facts, environment) or Finding(
            severity=Severity.PROBLEM,
            code="nunchaku-torch",
            text=f"{named} {misfit}: importing it fails (`DLL load failed`, `undefined symbol`)",
            mends=mends,
        )
        return
    yield Finding(severity=Severity.OK, code="nunchaku", text=named)


def _missing_needs(environment: Environment, named: str) -> Iterator[Finding]:
    for name, oldest in _NEEDS.items():
        version = environment.version_of(name)
        if version is None or release_of(version) < oldest:
            needed = ".".join(map(str, oldest))
            what = "is missing" if version is None else f"is {version}"
            yield Finding(
                severity=Severity.PROBLEM,
                code="nunchaku-requirement",
                text=f"{named} imports {name} {needed} or newer, which {what}",
                mends=(pip.install(environment, f"{name}>={needed}"),),
            )


def _misfit(version: str, torch: Torch) -> str | None:
    """Why a wheel and a torch do not go together, by the tags of the wheel."""
    if torch.error is not None:
        return None
    local = local_of(version)
    built_for = re.search(r"torch(\d+\.\d+)", local)
    if built_for and release_of(built_for[1]) != release_of(torch.version)[:2]:
        return f"is built for torch {built_for[1]}, but torch is {torch.version}"
    if torch.cuda is None:
        return f"is built for CUDA, but torch {torch.version} is not"
    tag = re.search(r"cu(\d+)", local)
    is_release = built_for is not None
    untagged = 12 if is_release and release_of(version) < wheels.CUDA_TAGGED else None
    cuda = int(tag[1]) if tag else untagged
    if cuda is not None and cuda != cuda_of(torch.cuda):
        return f"is built for CUDA {cuda}, but torch {torch.version} for CUDA {torch.cuda}"
    return None


def _wheel(system: System, environment: Environment) -> str | None:
    torch, python = environment.torch, environment.version
    if torch is None or torch.error is not None or python is None:
        return None
    return wheels.wheel_url(
        system=system.name,
        machine=system.machine,
        python=python,
        torch=torch.version,
        cuda=torch.cuda,
    )


def _installing(system: System, environment: Environment) -> tuple[Mend, ...]:
    """The command that installs the engine for the torch that is there."""
    url = _wheel(system, environment)
    return () if url is None else (pip.install(environment, url),)


def _without_wheel(facts: Facts, environment: Environment) -> Finding | None:
    """Find that no released wheel of the engine fits the installed torch; None otherwise."""
    torch = environment.torch
    # Where no wheel could run, none is missed.
    has_gpu = any(precision_of(gpu.capability) for gpu in facts.gpus)
    if not has_gpu or torch is None or torch.cuda is None:
        return None
    if _wheel(facts.system, environment) is not None:
        return None
    return Finding(
        severity=Severity.PROBLEM,
        code="torch-no-wheel",
        text=f"torch {torch.version} in {environment.python}: no wheel of Nunchaku is released for"
        f" it. There are wheels for {wheels.BUILT_FOR}",
        mends=_installing_with_torch(facts.system, environment),
    )


def _installing_with_torch(system: System, environment: Environment) -> tuple[Mend, ...]:
    """The commands that install the engine and a torch that it is built for."""
    url = wheels.wheel_url(
        system=system.name,
        machine=system.machine,
        python=environment.version or (0, 0),
        torch=wheels.NEWEST_TORCH,
        cuda=wheels.NEWEST_TORCH_CUDA,
    )
    if url is None:
        return ()
    return (torch_checks.reinstall(environment), pip.install(environment, url))


CHECKS = (_nunchaku,)
