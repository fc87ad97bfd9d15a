"""The one judge of values: NaN and infinity are found here, and the errors about them worded here.

Least and greatest values propagate NaN, and are one pass over memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.errors import NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwenlora.model.target import Target

__all__ = ["are_finite", "damaged", "is_finite", "non_finite", "non_finite_in"]


_DAMAGED = "a LoRA of the stack is damaged, or its strength is too high"


def is_finite(tensor: Tensor) -> bool:
    """Tell if no value is NaN or infinite in the tensor's own dtype."""
    return not tensor.numel() or bool(torch.isfinite(_extremes(tensor)).all())


def are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Tell for each tensor if all values are finite in float32, with one device synchronisation.

    Args:
        tensors: None of them empty, of any float dtypes, on any devices.
    """
    if not tensors:
        return []
    device = tensors[0].device
    extremes = [_extremes(tensor).to(device, torch.float32) for tensor in tensors]
    found: list[bool] = torch.isfinite(torch.stack(extremes)).all(dim=1).tolist()
    return found


def _extremes(tensor: Tensor) -> Tensor:
    wide = tensor.to(torch.float32) if tensor.itemsize == 1 else tensor
    return torch.stack(torch.aminmax(wide))


def non_finite(target: Target) -> NonFiniteError:
    """The error where a slot's delta holds NaN or infinity."""
    return non_finite_in(target.path, target.dtype)


def non_finite_in(what: str, dtype: object, *, hint: str = _DAMAGED) -> NonFiniteError:
    """The error where a tensor would hold NaN or infinity.

    Args:
        what: The slot, the parameter or the module.
        dtype: Its dtype, by the name that the caller's reader knows.
        hint: The likely cause.
    """
    return NonFiniteError(f"`{what}` would hold NaN or infinity in {dtype}\nhint: {hint}")


def damaged(module: str, whose: str) -> NonFiniteError:
    """The error where a tensor that was read holds NaN or infinity.

    Args:
        module: The module that it is for.
        whose: What holds it, as words.
    """
    return NonFiniteError(f"`{module}`: a tensor of {whose} holds NaN or infinity")
