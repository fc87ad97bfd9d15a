"""The NVIDIA GPUs as their driver names them; needs no torch."""

from __future__ import annotations

import subprocess

from qwenlora.doctor.facts import Gpu

__all__ = ["driver_gpus", "parse_gpus"]

_QUERY = "name,compute_cap,memory.total,driver_version"
_TIMEOUT_SECONDS = 30
_MIB = 1024 * 1024


def driver_gpus() -> tuple[Gpu, ...]:
    """The GPUs that `nvidia-smi` lists; none where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_gpus(done.stdout.decode("utf-8", "replace")) if done.returncode == 0 else ()


def parse_gpus(table: str) -> tuple[Gpu, ...]:
    """The GPUs of `nvidia-smi`'s table; lines that are not understood are passed over."""
    gpus = []
    for line in table.splitlines():
        try:
            # A name may hold commas.
            name, capability, memory, driver = (f.strip() for f in line.rsplit(",", 3))
            major, minor = capability.split(".")
            gpu = Gpu(
                name=name,
                capability=(int(major), int(minor)),
                memory_bytes=int(memory) * _MIB,
                driver=driver,
            )
        except ValueError:
            continue
        gpus.append(gpu)
    return tuple(gpus)
