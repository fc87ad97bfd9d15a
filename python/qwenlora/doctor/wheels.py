"""The wheels that Nunchaku is released as: one for each torch, each Python and each system.

PyPI has none of them; its package of that name is another one.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwenlora.doctor.version import cuda_of, release_of

__all__ = [
    "BUILT_FOR",
    "CUDA_TAGGED",
    "NEWEST_TORCH",
    "NEWEST_TORCH_CUDA",
    "NEWEST_TORCH_INDEX",
    "wheel_url",
]

_RELEASES = "https://github.com/nunchux-ai/nunchaku/releases/download"
_PYTHONS = ((3, 10), (3, 13))
_SYSTEMS = {("Linux", "x86_64"): "linux_x86_64", ("Windows", "AMD64"): "win_amd64"}

CUDA_TAGGED = (1, 2, 1)
"""From this version on a wheel's name tells its CUDA; those before are built with CUDA 12."""


@dataclass(frozen=True)
class _Release:
    """The newest release that has wheels for a torch.

    Attributes:
        cudas: Tags by CUDA's major version; an empty tag is not written.
    """

    version: str
    cudas: dict[int, str]


_UNTAGGED = {12: ""}
_BY_TORCH = {
    (2, 5): _Release("1.0.1", _UNTAGGED),
    (2, 6): _Release("1.0.1", _UNTAGGED),
    (2, 7): _Release("1.0.2", _UNTAGGED),
    (2, 8): _Release("1.2.1", {12: "cu12.8"}),
    (2, 9): _Release("1.2.1", {12: "cu12.8", 13: "cu13.0"}),
    (2, 10): _Release("1.2.1", {12: "cu12.8", 13: "cu13.0"}),
}
_NO_PYTHON = {((2, 5), (3, 13))}

BUILT_FOR = "torch 2.5 to 2.10, Python 3.10 to 3.13, Linux x86_64 and Windows"
"""The range of versions that have wheels, in words."""
NEWEST_TORCH = "2.10"
"""The newest torch that there are wheels for."""
NEWEST_TORCH_CUDA = "12.8"
"""The CUDA that it is to be built for."""
NEWEST_TORCH_INDEX = "https://download.pytorch.org/whl/cu128"
"""The package index of that torch."""


def wheel_url(
    *,
    system: str,
    machine: str,
    python: tuple[int, int],
    torch: str,
    cuda: str | None,
) -> str | None:
    """The address of the newest wheel for a torch, or None where none was released.

    Args:
        system: As `platform.system` names it.
        machine: As `platform.machine` names it.
        python: Its major and minor version.
        torch: Its version.
        cuda: The CUDA version that torch is built for.
    """
    numbers = release_of(torch)[:2]
    platform = _SYSTEMS.get((system, machine))
    release = _BY_TORCH.get((numbers[0], numbers[1])) if len(numbers) == 2 else None
    tag = release.cudas.get(cuda_of(cuda) or 0) if release else None
    if platform is None or release is None or tag is None:
        return None
    if not _PYTHONS[0] <= python <= _PYTHONS[1] or (numbers, python) in _NO_PYTHON:
        return None
    cpython = f"cp{python[0]}{python[1]}"
    built = f"{release.version}+{tag}torch{numbers[0]}.{numbers[1]}"
    return f"{_RELEASES}/v{release.version}/nunchaku-{built}-{cpython}-{cpython}-{platform}.whl"
