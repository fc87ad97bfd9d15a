"""The best low-rank form of a sum of low-rank deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Compressed", "compress", "energy"]


@dataclass(frozen=True)
class Compressed:
    """A sum brought to a lower rank.

    Attributes:
        down: (k, in) float32.
        up: (out, k) float32.
        energy_lost: 1 - |kept|^2 / |sum|^2 in the Frobenius norm.
    """

    down: Tensor
    up: Tensor
    energy_lost: float


def compress(pairs: Sequence[tuple[Tensor, Tensor]], rank: int) -> Compressed:
    """Truncate the sum of `up @ down` to `rank`, optimally (Eckart and Young, 1936).

    With down^T = Qd Rd and up = Qu Ru the sum is Qu (Ru Rd^T) Qd^T, so the SVD of the small core is
    that of the sum; the sum itself is never formed. The singular values are shared evenly between
    the halves, which keeps both in the range of float16.

    Args:
        pairs: (down (r, in), up (out, r)) with the scale in `up`, any float dtype, one device.
        rank: Most ranks to keep.

    Returns:
        The truncated sum and the energy that it lacks.
    """
    down = torch.cat([pair[0].to(torch.float32) for pair in pairs])
    up = torch.cat([pair[1].to(torch.float32) for pair in pairs], dim=1)
    q_down, r_down = torch.linalg.qr(down.mT)
    q_up, r_up = torch.linalg.qr(up)
    left, values, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    kept = min(rank, values.shape[0])
    root = values[:kept].sqrt()
    energy = values.to(torch.float64).square()
    total = float(energy.sum())
    lost = float(energy[kept:].sum()) / total if total > 0 else 0.0
    return Compressed(
        down=root.unsqueeze(1) * (right[:kept] @ q_down.mT),
        up=(q_up @ left[:, :kept]) * root,
        energy_lost=lost,
    )


def energy(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Squared Frobenius norm of the sum of `up @ down`, from the halves' Gram matrices.

    Args:
        pairs: (down (r, in), up (out, r)), any float dtype, one device.
    """
    if not pairs:
        return 0.0
    down = torch.cat([pair[0].to(torch.float32) for pair in pairs])
    up = torch.cat([pair[1].to(torch.float32) for pair in pairs], dim=1)
    # |U D|^2 = tr(U^T U D D^T)
    return max(0.0, float(((up.mT @ up).double() * (down @ down.mT).double()).sum()))
