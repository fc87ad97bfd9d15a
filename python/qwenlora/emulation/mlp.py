"""Stand-in for Nunchaku's fused MLP kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F

from qwenlora.emulation.contract import KernelContractError
from qwenlora.emulation.precision import Precision

if TYPE_CHECKING:
    import torch

    from qwenlora.emulation.linear import SVDQW4A4Linear


def fused_gelu_mlp(x: torch.Tensor, fc1: SVDQW4A4Linear, fc2: SVDQW4A4Linear) -> torch.Tensor:
    """Compute fc2(gelu(fc1(x))) without calling either layer as a module.

    The epilogue of the first product runs in the kernel's order: bias, up projection of `fc1`,
    GELU (tanh approximation), down projection of `fc2` on the unshifted GELU output, and only then
    shift, smoothing and quantization for the second product.

    Args:
        x: (…, K), dtype of the layers.
        fc1: K → H.
        fc2: H → N; unsigned activations in a real int4 model.

    Returns:
        (…, N), dtype of `x`.

    Raises:
        KernelContractError: A tensor of either layer breaks the kernels' contract, or the layers do
            not fit together.
    """
    if fc1.out_features != fc2.in_features or fc1.precision is not fc2.precision:
        raise KernelContractError(f"layers do not fit together: {fc1!r} and {fc2!r}")
    fc1.check(x)
    # `fc2` meets the hidden activation, which has the dtype and device of the input.
    fc2.check(x.new_empty(0, fc2.in_features))
    rows = x.reshape(-1, fc1.in_features)  # (M, K)
    hidden = fc1.product(*fc1.rounded(rows))  # (M, H) float32
    if fc1.precision is not Precision.EXACT:
        hidden = hidden.to(x.dtype)
    hidden = F.gelu(hidden, approximate="tanh")
    output = fc2.product(*fc2.rounded(hidden))  # (M, N) float32
    return output.to(x.dtype).view(*x.shape[:-1], fc2.out_features)
