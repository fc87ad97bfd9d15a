"""Z-Image transformers as each of the software that loads 4-bit ones builds them, on a CPU."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwenlora.emulation.dense import random_smooth
from qwenlora.emulation.linear import SVDQW4A4Linear
from qwenlora.emulation.lite_layers import lite_layers
from qwenlora.emulation.lite_model import fill
from qwenlora.emulation.z_image_comfy import (
    ComfyAttention,
    ComfyFeedForward,
    ComfyFusedAttention,
    ComfyQuantizedFeedForward,
    ComfyZImageBlock,
    ComfyZImageTransformer,
)
from qwenlora.emulation.z_image_form import ZImageForm
from qwenlora.emulation.z_image_layers import (
    CalledAttention,
    FusedAttention,
    ModulationLinear,
    PassedAttention,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qwenlora.emulation.precision import Precision

__all__ = ["z_image_transformer"]

BLOCK_LISTS = ("noise_refiner", "context_refiner", "layers")
QUERY_KEY_VALUE = ("attention.to_q", "attention.to_k", "attention.to_v")
OUT = "attention.to_out.0"
GATED = ("feed_forward.w3", "feed_forward.w1")
BACK = "feed_forward.w2"

_ATTENTION = {
    ZImageForm.CALLED: CalledAttention,
    ZImageForm.FUSED: FusedAttention,
    ZImageForm.PASSED: PassedAttention,
}
_COMFY_ATTENTION = {
    ZImageForm.COMFYUI: ComfyFusedAttention,
    ZImageForm.COMFYUI_CALLED: ComfyAttention,
}


def z_image_transformer(
    dense: nn.Module,
    *,
    form: ZImageForm,
    rank: int,
    precision: Precision,
    dtype: torch.dtype,
    quantized_refiners: bool = True,
    seed: int = 0,
) -> Any:
    """Quantize a dense diffusers `ZImageTransformer2DModel`.

    Args:
        dense: The dense model; it is only read. Heads have 128 channels. The MLP's width is a
            multiple of 64 in `EXACT` and of 128 in `W4A4` precision, so the model's of 384.
        form: Which software's model it becomes.
        rank: Rank of the base low-rank branches, a multiple of 16.
        precision: See `Precision`.
        dtype: Dtype of activations and plain weights.
        quantized_refiners: Whether the blocks of both refiners are quantized, too. If not, they are
            what the form's software leaves of them: their MLP is `net.0.proj` and `net.2` in
            Nunchaku's and nunchaku-lite's models, their query, key and value one linear in
            ComfyUI's.
        seed: Chooses the smooth factors, which differ from 1.

    Returns:
        A new model on the CPU: diffusers' class, or in ComfyUI's forms a module with its arguments.

    Raises:
        ImportError: diffusers is not installed, or for `STOCK` has no such layers.
        ValueError: The model has a third refiner, for SigLIP's features.
    """
    source = copy.deepcopy(dense)
    # Past the model's own `to`, which warns of what another dtype may do.
    nn.Module.to(source, "cpu", dtype)
    model: Any = source
    if model.siglip_refiner is not None:
        raise ValueError("option is not emulated: `siglip_feat_dim`")
    quantizer = _Quantizer(dense.state_dict(), rank, precision, dtype, seed)
    lists = BLOCK_LISTS if quantized_refiners else ("layers",)
    if form is ZImageForm.STOCK:
        _stock(model, quantizer, lists)
    elif form in _COMFY_ATTENTION:
        model = _comfy(model, quantizer, lists, _COMFY_ATTENTION[form])
    else:
        _replaced(model, quantizer, lists, form)
    return model.eval()


class _Quantizer:
    """Makes the 4-bit layers of a model from its dense weights."""

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        rank: int,
        precision: Precision,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.rank = rank
        self.precision = precision
        self.dtype = dtype
        self._weights = weights
        self._generator = torch.Generator().manual_seed(seed)

    def layer(self, block: str, *names: str) -> SVDQW4A4Linear:
        """Make the layer that has the rows of these linears of a block, in order."""
        weight = self.rows(block, *names)
        return SVDQW4A4Linear.from_dense(
            weight,
            None,
            rank=self.rank,
            precision=self.precision,
            dtype=self.dtype,
            smooth=random_smooth(weight.shape[1], self._generator),
            generator=self._generator,
        )

    def linear(self, block: str, *names: str) -> nn.Linear:
        """Make the dense linear that has these rows."""
        weight = self.rows(block, *names).to(self.dtype)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        return linear

    def rows(self, block: str, *names: str) -> torch.Tensor:
        """Return the dense weights, (all rows, K)."""
        return torch.cat([self._weights[f"{block}.{name}.weight"] for name in names]).cpu()


def _blocks(model: Any, lists: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name in lists:
        for index, block in enumerate(getattr(model, name)):
            yield f"{name}.{index}", block


def _stock(model: Any, quantizer: _Quantizer, lists: tuple[str, ...]) -> None:
    names = (*QUERY_KEY_VALUE, OUT, "feed_forward.w1", BACK, "feed_forward.w3")
    layers = [(path, name) for path, _ in _blocks(model, lists) for name in names]
    targets = [f"{path}.{name}" for path, name in layers]
    config = {"precision": "int4", "group_size": 64, "rank": quantizer.rank, "targets": targets}
    lite_layers(quantizer.precision).replace_with_nunchaku_linear(
        model, {"svdq_w4a4": config}, quantizer.dtype
    )
    for path, name in layers:
        fill(model.get_submodule(f"{path}.{name}"), quantizer.layer(path, name))


def _replaced(model: Any, quantizer: _Quantizer, lists: tuple[str, ...], form: ZImageForm) -> None:
    for path, block in _blocks(model, BLOCK_LISTS):
        if path.partition(".")[0] in lists:
            block.attention = _ATTENTION[form](
                block.attention,
                quantizer.layer(path, *QUERY_KEY_VALUE),
                quantizer.layer(path, OUT),
            )
            make = quantizer.layer
        else:
            make = quantizer.linear  # type: ignore[assignment]
        block.feed_forward = _swiglu(make(path, *GATED), make(path, BACK))
    if form is ZImageForm.PASSED:
        for _, block in _blocks(model, lists):
            if block.modulation:
                block.adaLN_modulation[0] = ModulationLinear.of(block.adaLN_modulation[0])


def _swiglu(gated: nn.Module, back: Any) -> Any:
    from diffusers.models.attention import FeedForward

    with torch.device("meta"):
        feed_forward = FeedForward(
            back.out_features,
            activation_fn="swiglu",
            inner_dim=back.in_features,
            bias=False,
        )
    net: Any = feed_forward.net
    net[0].proj, net[2] = gated, back
    return feed_forward


def _comfy(
    model: Any, quantizer: _Quantizer, lists: tuple[str, ...], attention: type[ComfyAttention]
) -> ComfyZImageTransformer:
    blocks: dict[str, list[ComfyZImageBlock]] = {name: [] for name in BLOCK_LISTS}
    for path, block in _blocks(model, BLOCK_LISTS):
        name = path.partition(".")[0]
        if name in lists:
            made = _comfy_quantized(path, block, quantizer, attention)
        else:
            made = _comfy_dense(path, block, quantizer)
        blocks[name].append(made)
    return ComfyZImageTransformer(model, blocks)


def _comfy_quantized(
    path: str, block: Any, quantizer: _Quantizer, attention: type[ComfyAttention]
) -> ComfyZImageBlock:
    names = (QUERY_KEY_VALUE, (OUT,), GATED, (BACK,))
    qkv, out, gated, back = layers = [quantizer.layer(path, *own) for own in names]
    if attention is ComfyFusedAttention:
        for layer in layers:
            _cast_by_comfy(layer)
    made = attention(block.attention, qkv, out)
    return ComfyZImageBlock(block, made, ComfyQuantizedFeedForward(gated, back))


def _comfy_dense(path: str, block: Any, quantizer: _Quantizer) -> ComfyZImageBlock:
    attention = ComfyAttention(
        block.attention,
        quantizer.linear(path, *QUERY_KEY_VALUE),
        quantizer.linear(path, OUT),
    )
    linears = (quantizer.linear(path, f"feed_forward.{name}") for name in ("w1", "w2", "w3"))
    return ComfyZImageBlock(block, attention, ComfyFeedForward(*linears))


def _cast_by_comfy(layer: Any) -> None:
    """Give a layer what ComfyUI asks of one that it moves by itself, as the pack does since 1.2."""
    layer.comfy_cast_weights = False
    layer.weight = None
