"""Rotary positions of Qwen-Image: three axes for image tokens, one line for text tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

THETA = 10000.0

ImageShape = tuple[int, int, int]
"""Frames, height and width of one image, in tokens."""


def rotations(
    image_shapes: Sequence[ImageShape],
    text_length: int,
    axes_dims: tuple[int, int, int],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the rotations of one sample.

    Height and width count from the middle of each image, frames from the index of the image; text
    goes on along the diagonal behind the largest half side.

    Args:
        image_shapes: The images whose tokens follow each other in the sequence.
        text_length: Number of text tokens.
        axes_dims: Channels of a head given to frame, height and width; their sum is head_dim.
        device: Where the result lies.

    Returns:
        image: (S, head_dim/2) complex64.
        text: (text_length, head_dim/2) complex64.
    """
    images = []
    text_begin = 0
    for index, (frames, height, width) in enumerate(image_shapes):
        ranges = (
            torch.arange(index, index + frames, device=device),
            torch.arange(height, device=device) - (height - height // 2),
            torch.arange(width, device=device) - (width - width // 2),
        )
        # (3, frames*height*width): one row of positions per axis
        positions = torch.stack(torch.meshgrid(*ranges, indexing="ij")).flatten(1)
        images.append(_rotations_at(positions, axes_dims))
        text_begin = max(text_begin, height // 2, width // 2)
    line = torch.arange(text_begin, text_begin + text_length, device=device)
    return torch.cat(images), _rotations_at(line.expand(3, -1), axes_dims)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbouring channels by its rotation.

    Args:
        x: (B, S, heads, head_dim).
        rotation: (S, head_dim/2) or (B, S, head_dim/2) complex64.

    Returns:
        Same shape and dtype as `x`.
    """
    # float32: complex products have no 16-bit form
    pairs = torch.view_as_complex(
        x.float().reshape(*x.shape[:-1], -1, 2)
    )  # (B, S, heads, head_dim/2)
    return torch.view_as_real(pairs * rotation[..., None, :]).flatten(-2).to(x.dtype)


def _rotations_at(positions: torch.Tensor, axes_dims: tuple[int, int, int]) -> torch.Tensor:
    # (3, S) positions -> (S, sum(axes_dims)/2) unit complex numbers
    angles = []
    for axis, dims in zip(positions, axes_dims, strict=True):
        exponents = torch.arange(0, dims, 2, device=positions.device).float() / dims
        angles.append(torch.outer(axis, 1.0 / torch.pow(THETA, exponents)))  # (S, dims/2)
    joined = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(joined), joined)
