"""Checks that torch is installed, works, and reaches the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.doctor.checks import pip
from qwenlora.doctor.finding import Finding, Severity
from qwenlora.doctor.version import release_of
from qwenlora.doctor.wheels import NEWEST_TORCH, NEWEST_TORCH_INDEX
from qwenlora.requirements import OLDEST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenlora.doctor.facts import Environment, Facts, Torch
    from qwenlora.doctor.mend import Run

__all__ = ["CHECKS", "reinstall"]

_OLDEST = OLDEST["torch"]


def reinstall(environment: Environment) -> Run:
    """Install the newest torch that Nunchaku is built for, with CUDA."""
    what = (f"torch=={NEWEST_TORCH}.*", "torchvision", "torchaudio")
    return pip.install(environment, "--force-reinstall", *what, "--index-url", NEWEST_TORCH_INDEX)


def _torch(facts: Facts) -> Iterator[Finding]:
    for environment in facts.environments:
        if environment.fault is None:
            yield _judge(environment, bool(facts.gpus))


def _judge(environment: Environment, has_gpu: bool) -> Finding:
    torch, python = environment.torch, environment.python
    if torch is None:
        return Finding(
            severity=Severity.PROBLEM,
            code="torch-missing",
            text=f"torch is not installed in {python}: only `qwenlora keys` works there",
            mends=(reinstall(environment),),
        )
    if torch.error is not None:
        return Finding(
            severity=Severity.PROBLEM,
            code="torch-broken",
            text=f"torch in {python} cannot be imported: {torch.error}",
            mends=(reinstall(environment),),
        )
    if release_of(torch.version) < release_of(_OLDEST):
        return Finding(
            severity=Severity.PROBLEM,
            code="torch-old",
            text=f"torch {torch.version} in {python}: qwenlora needs {_OLDEST} or newer",
            mends=(reinstall(environment),),
        )
    return _judge_gpu(environment, torch, has_gpu)


def _judge_gpu(environment: Environment, torch: Torch, has_gpu: bool) -> Finding:
    named = f"torch {torch.version} in {environment.python}"
    if torch.is_available:
        return Finding(severity=Severity.OK, code="torch", text=f"{named} uses the GPU")
    if not has_gpu:
        return Finding(
            severity=Severity.OK,
            code="torch-cpu",
            text=f"{named} works, without a GPU",
        )
    if torch.cuda is None:
        return Finding(
            severity=Severity.PROBLEM,
            code="torch-cpu-build",
            text=f"{named} is built without CUDA: it cannot use the GPU",
            mends=(reinstall(environment),),
        )
    said = f": {torch.warning}" if torch.warning else ""
    return Finding(
        severity=Severity.PROBLEM,
        code="torch-no-gpu",
        text=f"{named}, built for CUDA {torch.cuda}, cannot use the GPU{said}; mostly the driver is"
        " too old for this CUDA: install the newest from nvidia.com/drivers",
    )


CHECKS = (_torch,)
