"""The best low-rank approximation of a dense weight: the base branch of an SVDQ layer."""

from __future__ import annotations

import torch

_EXACT_SVD_LIMIT = 128
_OVERSAMPLING = 16
_POWER_ITERATIONS = 3


def low_rank_factors(
    weight: torch.Tensor, rank: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split off the leading singular directions of a weight.

    Both factors carry the square root of the singular values. Where the shorter side is longer than
    128 the directions come from a randomized range finder. A full SVD takes five times as long at
    256, and minutes at the width of a real model.

    Args:
        weight: (out, in) float32.
        rank: Rank of the result; directions that the weight does not have are zero.
        generator: Source of the range finder's random matrix; a fixed seed when None.

    Returns:
        down: (rank, in) float32.
        up: (out, rank) float32, so that up @ down approximates the weight.
    """
    if min(weight.shape) <= _EXACT_SVD_LIMIT:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = _randomized_svd(weight, rank, generator)
    kept = min(rank, values.shape[0])
    roots = values[:kept].sqrt()
    down = weight.new_zeros(rank, weight.shape[1])
    up = weight.new_zeros(weight.shape[0], rank)
    down[:kept] = roots[:, None] * right[:kept]
    up[:, :kept] = left[:, :kept] * roots
    return down, up


def _randomized_svd(
    weight: torch.Tensor, rank: int, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    width = min(rank + _OVERSAMPLING, min(weight.shape))
    # Drawn on the generator's device, so that the result does not depend on the weight's.
    probe = torch.randn(weight.shape[1], width, generator=generator, device=generator.device)
    basis = torch.linalg.qr(weight @ probe.to(weight)).Q  # (out, width)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(weight.T @ basis).Q  # (in, width)
        basis = torch.linalg.qr(weight @ basis).Q  # (out, width)
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ left, values, right
