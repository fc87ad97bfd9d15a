"""Z-Image's attentions whose query, key and value a kernel computes: called, and in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

from qwenlora.emulation.fused_qkv import EPSILON, HEAD_DIM
from qwenlora.model.opened import OpenedForm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from qwenlora.model.target import Target

__all__ = ["FusedAttention", "attentions_of", "call", "rotation", "turned"]


def rotation(tokens: int) -> Tensor:
    """Rotations of as many tokens, (1, S, 64) complex64."""
    generator = torch.Generator().manual_seed(1)
    angles = torch.randn(1, tokens, HEAD_DIM // 2, generator=generator)
    return torch.polar(torch.ones_like(angles), 3 * angles)


def call(attention: nn.Module, x: Tensor) -> Tensor:
    """An attention of (1, S, C) as its block calls it."""
    turn = rotation(x.shape[1])
    with torch.no_grad():
        if not hasattr(attention, "qkv"):
            return attention(x, attention_mask=None, freqs_cis=turn)
        rows = torch.stack([turn.real, -turn.imag, turn.imag, turn.real], dim=-1)
        matrices = rows.view(1, -1, 1, HEAD_DIM // 2, 2, 2)
        return attention(x, None, matrices, transformer_options={})


def turned(qkv: Tensor, norms: Sequence[Tensor]) -> list[Tensor]:
    """Query and key, normed and rotated, and value of (1, S, 3C), (1, S, H, 128) float64 each."""
    parts = list(qkv.double().unflatten(-1, (3, -1, HEAD_DIM)).unbind(2))
    turn = rotation(qkv.shape[1]).to(torch.complex128)[:, :, None]
    for place, weight in enumerate(norms):
        own = parts[place]
        own = own * (own.square().mean(dim=-1, keepdim=True) + EPSILON).rsqrt() * weight.double()
        pairs = torch.view_as_complex(own.unflatten(-1, (-1, 2)).contiguous())
        parts[place] = torch.view_as_real(pairs * turn).flatten(-2)
    return parts


def attended(qkv: Tensor, norms: Sequence[Tensor]) -> Tensor:
    """What the last linear is given, (1, S, C) float64, of (1, S, 3C)."""
    query, key, value = (part.transpose(1, 2) for part in turned(qkv, norms))
    merged = F.scaled_dot_product_attention(query, key, value)
    return merged.transpose(1, 2).flatten(2)


class FusedAttention(NamedTuple):
    """The paths of what such an attention runs.

    Attributes:
        qkv: Of query, key and value.
        norms: Of the norms of query and key.
        out: Of the last linear.
    """

    qkv: str
    norms: tuple[str, str]
    out: str


def attentions_of(targets: Mapping[str, Target]) -> dict[str, FusedAttention]:
    """Those of a model by their paths."""
    found = {}
    for path, target in targets.items():
        if target.opened is None or target.opened.form is OpenedForm.MLP:
            continue
        attention = path.partition(".attention.")[0] + ".attention"
        own = [name for name in targets if name.startswith(f"{attention}.")]
        query, key = (
            next(name for name in own if name.endswith((f"norm_{letter}", f"{letter}_norm")))
            for letter in "qk"
        )
        out = next(name for name in own if name.endswith((".out", ".to_out.0")))
        found[attention] = FusedAttention(path, (query, key), out)
    return found
