"""Attention of 4-bit Z-Image blocks, in the forms that keep diffusers' names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import functional as F

from qwenlora.emulation.arithmetic import SVDQTensors
from qwenlora.emulation.fused_qkv import fused_qkv_norm_rotary
from qwenlora.emulation.leaf import QuantizedLeaf, frozen
from qwenlora.emulation.rope import rotate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwenlora.emulation.linear import SVDQW4A4Linear


class ZImageAttention(nn.Module):
    """Attention over one stream, which a processor computes.

    Attributes:
        heads: H.
        processor: Called with the module and its arguments.
        to_out: The last projection, and a dropout.
    """

    to_out: nn.ModuleList

    def __init__(self, heads: int, processor: ZImageProcessor | StockProcessor) -> None:
        super().__init__()
        self.heads = heads
        self.processor = processor

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Attend; see `ZImageProcessor.__call__`."""
        return self.processor(
            attn=self,
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **cross_attention_kwargs,
        )


class ZImageProcessor:
    """Computes an attention; a form says how query, key and value come about."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            attn: A `ZImageAttention`.
            hidden_states: (B, S, C).
            encoder_hidden_states: Ignored: there is one stream.
            attention_mask: (B, S) bool, true for tokens to see, or None.
            freqs_cis: (B, S, D/2) complex64 rotations.

        Returns:
            (B, S, C).
        """
        del encoder_hidden_states
        query, key, value = self.project(attn, hidden_states, freqs_cis)
        merged = attend(query, key, value, attention_mask)
        projected: Tensor = attn.to_out[1](attn.to_out[0](merged))
        return projected

    def project(self, attn: Any, x: Tensor, freqs_cis: Tensor | None) -> Sequence[Tensor]:
        """Return query and key, normalized and rotated, and value, (B, S, H, D) each."""
        raise NotImplementedError


class CalledProcessor(ZImageProcessor):
    """Calls `to_qkv`, then `norm_q` and `norm_k`."""

    def project(self, attn: Any, x: Tensor, freqs_cis: Tensor | None) -> Sequence[Tensor]:
        """See `ZImageProcessor.project`."""
        query, key, value = split(attn.to_qkv(x), attn.heads)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if freqs_cis is not None:
            query, key = rotate(query, freqs_cis), rotate(key, freqs_cis)
        return query, key, value


class FusedProcessor(ZImageProcessor):
    """Calls `fused_module`."""

    def project(self, attn: Any, x: Tensor, freqs_cis: Tensor | None) -> Sequence[Tensor]:
        """See `ZImageProcessor.project`."""
        return split(attn.fused_module(x, freqs_cis), attn.heads)


class StockProcessor:
    """diffusers' own: calls `to_q`, `to_k` and `to_v`, and the norms that there are."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """See `ZImageProcessor.__call__`."""
        del encoder_hidden_states
        layers = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in layers
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if freqs_cis is not None:
            query, key = rotate(query, freqs_cis), rotate(key, freqs_cis)
        merged = attend(query, key, value, attention_mask)
        projected: Tensor = attn.to_out[1](attn.to_out[0](merged))
        return projected


class PassedProcessor(StockProcessor):
    """Reads the tensors of `to_qkv`, `norm_q` and `norm_k`, and calls none."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """See `ZImageProcessor.__call__`."""
        del encoder_hidden_states
        norms = (attn.norm_q.weight, attn.norm_k.weight)
        fused = fused_qkv_norm_rotary(hidden_states, attn.to_qkv, *norms, freqs_cis)
        query, key, value = split(fused, attn.heads)
        merged = attend(query, key, value, attention_mask)
        projected: Tensor = attn.to_out[1](attn.to_out[0](merged))
        return projected


class CalledAttention(ZImageAttention):
    """Attention with `norm_q`, `norm_k`, `to_qkv` and `to_out`."""

    def __init__(self, dense: Any, to_qkv: SVDQW4A4Linear, to_out: SVDQW4A4Linear) -> None:
        super().__init__(dense.heads, CalledProcessor())
        self.norm_q = dense.norm_q
        self.norm_k = dense.norm_k
        self.to_qkv = to_qkv
        self.to_out = _with_first(dense.to_out, to_out)


class FusedAttention(ZImageAttention):
    """Attention with `to_out` and `fused_module`."""

    def __init__(self, dense: Any, to_qkv: SVDQW4A4Linear, to_out: SVDQW4A4Linear) -> None:
        super().__init__(dense.heads, FusedProcessor())
        self.to_out = _with_first(dense.to_out, to_out)
        self.fused_module = FusedQkv(to_qkv, dense.norm_q, dense.norm_k)


class PassedAttention(ZImageAttention):
    """Attention with `to_qkv`, `norm_q`, `norm_k` and `to_out`."""

    def __init__(self, dense: Any, to_qkv: SVDQW4A4Linear, to_out: SVDQW4A4Linear) -> None:
        super().__init__(dense.heads, PassedProcessor())
        self.to_qkv = to_qkv
        self.norm_q = dense.norm_q
        self.norm_k = dense.norm_k
        self.to_out = _with_first(dense.to_out, to_out)


class FusedQkv(QuantizedLeaf):
    """The tensors of `to_qkv`, `norm_q` and `norm_k`, which one function reads.

    Attributes:
        qkv_precision: `precision` of the layer that the tensors are from.
        qkv_wcscales: As in `SVDQW4A4Linear`, with its `wtscale`: the kernel is given none.
        qkv_out_features: Rows of query, key and value.
        qkv_qweight: As in `SVDQW4A4Linear`; so are `qkv_wscales`, `qkv_smooth_factor`,
            `qkv_smooth_factor_orig`, `qkv_proj_down` and `qkv_proj_up`.
        norm_q_weight: (128,).
        norm_k_weight: (128,).
    """

    _weight_name = "qkv_qweight"
    qkv_qweight: nn.Parameter
    qkv_wscales: nn.Parameter
    qkv_smooth_factor: nn.Parameter
    qkv_proj_down: nn.Parameter
    qkv_proj_up: nn.Parameter

    def __init__(self, qkv: SVDQW4A4Linear, norm_q: nn.Module, norm_k: nn.Module) -> None:
        super().__init__()
        for name, parameter in qkv.named_parameters():
            self.register_parameter(f"qkv_{name}", parameter)
        if qkv.wcscales is not None and qkv.wtscale is not None:
            self.qkv_wcscales = frozen(qkv.wcscales * qkv.wtscale)
        self.qkv_precision = qkv.precision
        self.qkv_out_features = qkv.out_features
        self.norm_q_weight: nn.Parameter = norm_q.weight  # type: ignore[assignment]
        self.norm_k_weight: nn.Parameter = norm_k.weight  # type: ignore[assignment]

    def forward(self, x: Tensor, freqs_cis: Tensor | None = None) -> Tensor:
        """Map (B, S, C) to (B, S, 3C), query and key normalized and rotated by (B, S, D/2)."""
        qkv = SVDQTensors(
            in_features=x.shape[-1],
            out_features=self.qkv_out_features,
            precision=self.qkv_precision,
            qweight=self.qkv_qweight,
            bias=getattr(self, "qkv_bias", None),
            wscales=self.qkv_wscales,
            smooth_factor=self.qkv_smooth_factor,
            proj_down=self.qkv_proj_down,
            proj_up=self.qkv_proj_up,
            wcscales=getattr(self, "qkv_wcscales", None),
        )
        return fused_qkv_norm_rotary(x, qkv, self.norm_q_weight, self.norm_k_weight, freqs_cis)


class ModulationLinear(nn.Linear):
    """The class that nunchaku-lite gives a modulation: a linear that multiplies by itself."""

    @classmethod
    def of(cls, linear: nn.Linear) -> ModulationLinear:
        """Take over a linear's parameters."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Map (…, K) to (…, N)."""
        return F.linear(input, self.weight, self.bias)


def split(fused: Tensor, heads: int) -> Sequence[Tensor]:
    """(B, S, 3C) => query, key and value, (B, S, H, D) each."""
    return fused.view(*fused.shape[:-1], 3, heads, -1).unbind(-3)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend over all tokens.

    Args:
        query: (B, S, H, D).
        key: (B, S, H, D).
        value: (B, S, H, D).
        mask: (B, S) bool, true for tokens to see, or None.

    Returns:
        (B, S, H*D).
    """
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]  # (B, 1, 1, S)
    # (B, S, H, D) => (B, H, S, D)
    attended: Tensor = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return attended.transpose(1, 2).flatten(2)


def _with_first(layers: nn.ModuleList, first: nn.Module) -> nn.ModuleList:
    layers[0] = first
    return layers
