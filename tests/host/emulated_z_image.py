"""ComfyUI's Z-Image over emulated Nunchaku leaves, built the way ComfyUI-nunchaku builds it.

The transformer is ComfyUI's own: attention and feed-forward of its blocks are replaced, and hooks
bring the rotation into the kernel's form. The patcher joins ComfyUI's LoRA patches with the packed
layers when it loads the model, and puts those layers' factors back when it unpatches. Imports
ComfyUI: only a fixture that has started the host may import this module.
"""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.lumina.model import JointAttention
from comfy.ldm.modules.attention import optimized_attention_masked
from comfy.weight_adapter.lora import LoRAAdapter
from torch import nn

from qwenlora.emulation import Precision, SVDQW4A4Linear
from qwenlora.emulation.dense import random_smooth
from qwenlora.emulation.fused_qkv import ROWS_PADDED
from qwenlora.packing import pack
from qwenlora.packing.layout import LowRankSide
from qwenlora.packing.rotation import pack_rotations, unpack_rotations

from .small_qwen import devices

NORM_EPSILON = 1e-6
QWEIGHT = ".qweight"
HALVES = ("feed_forward.w3", "feed_forward.w1")
"""What the rows of `feed_forward.w13` are, in order."""


def emulated_z_image(
    dense: comfy.model_patcher.ModelPatcher,
    *,
    rank: int = 32,
    precision: Precision = Precision.EXACT,
    dense_refiners: bool = False,
) -> EmulatedZImagePatcher:
    """Convert a model of `small_z_image.small_z_image`; in EXACT precision it computes the same.

    Args:
        dense: The dense model; it is only read.
        rank: Rank of the base low-rank branches.
        precision: See `Precision`.
        dense_refiners: Whether the refiners stay ComfyUI's own blocks.
    """
    transformer = dense.model.diffusion_model
    config = comfy.supported_models.ZImage(dense.model.model_config.unet_config)
    config.set_inference_dtype(transformer.dtype, None)
    model = config.get_model({}, "")
    made = model.diffusion_model
    made.load_state_dict(transformer.state_dict())
    leaf = Leaf(rank, precision, transformer.dtype, torch.Generator().manual_seed(0))
    blocks = [*made.layers]
    if not dense_refiners:
        blocks += [*made.noise_refiner, *made.context_refiner]
    for block in blocks:
        block.attention = EmulatedAttention(block.attention, leaf)
        block.feed_forward = EmulatedFeedForward(block.feed_forward, leaf)
    RotaryHooks.install(made)
    made.norm_final = None
    return EmulatedZImagePatcher(model, **devices())


class Leaf(NamedTuple):
    """How the quantized layers are made."""

    rank: int
    precision: Precision
    dtype: torch.dtype
    generator: torch.Generator

    def of(self, *linears: nn.Linear) -> SVDQW4A4Linear:
        """One quantized layer of the rows of one or more dense ones, without biases."""
        weight = torch.cat([linear.weight.detach() for linear in linears])
        layer = SVDQW4A4Linear.from_dense(
            weight,
            None,
            rank=self.rank,
            precision=self.precision,
            dtype=self.dtype,
            smooth=random_smooth(weight.shape[1], self.generator),
            generator=self.generator,
        )
        # ComfyUI looks for both where it places a model that does not fit the device.
        layer.comfy_cast_weights = linears[0].comfy_cast_weights
        layer.weight = None
        return layer


class EmulatedAttention(JointAttention):
    """Attention whose projection, norms and rotation are one kernel: `qkv` is never called."""

    def __init__(self, dense: JointAttention, leaf: Leaf) -> None:
        nn.Module.__init__(self)
        self.n_kv_heads = dense.n_kv_heads
        self.n_local_heads = dense.n_local_heads
        self.n_local_kv_heads = dense.n_local_kv_heads
        self.n_rep = dense.n_rep
        self.head_dim = dense.head_dim
        self.qkv = leaf.of(dense.qkv)
        self.out = leaf.of(dense.out)
        self.q_norm, self.k_norm = dense.q_norm, dense.k_norm

    def forward(self, x, x_mask, freqs_cis, transformer_options={}):  # noqa: B006 - the host's own
        query, key, value = fused_qkv_norm_rotary(
            x, self.qkv, self.q_norm.weight, self.k_norm.weight, freqs_cis, self.head_dim
        )
        output = optimized_attention_masked(
            query.movedim(1, 2),
            key.movedim(1, 2),
            value.movedim(1, 2),
            self.n_local_heads,
            x_mask,
            skip_reshape=True,
            transformer_options=transformer_options,
        )
        return self.out(output)


def fused_qkv_norm_rotary(
    x: torch.Tensor,
    qkv: SVDQW4A4Linear,
    query_norm: torch.Tensor,
    key_norm: torch.Tensor,
    packed: torch.Tensor,
    head_dim: int,
) -> list[torch.Tensor]:
    """The kernel: it reads the layer's tensors, so that no hook on the layer runs.

    Args:
        x: (B, S, C).
        qkv: Rows of query, key and value.
        query_norm: (D,).
        key_norm: (D,).
        packed: (B or 1, S and more, D) float32, what `RotaryHooks` makes.
        head_dim: D.

    Returns:
        Query, key and value, each (B, S, H, D) in the dtype of `x`.
    """
    qkv.check(x)
    rows = qkv.product(*qkv.rounded(x.reshape(-1, x.shape[-1])))  # (B*S, 3*H*D) float32
    parts = rows.view(*x.shape[:-1], 3, qkv.qweight.shape[0] // (3 * head_dim), head_dim).unbind(2)
    sin_cos = unpack_rotations(packed)[:, : x.shape[1], None]
    sin, cos = sin_cos.unbind(-1)  # (B or 1, S, 1, D/2)
    turned = []
    for part, norm in zip(parts, (query_norm, key_norm), strict=False):
        size = part.square().mean(-1, keepdim=True).add(NORM_EPSILON).rsqrt()
        first, second = (part * size * norm.float()).unflatten(-1, (-1, 2)).unbind(-1)
        pairs = (cos * first - sin * second, sin * first + cos * second)
        turned.append(torch.stack(pairs, dim=-1).flatten(-2))
    return [part.to(x.dtype) for part in (*turned, parts[2])]


class EmulatedFeedForward(nn.Module):
    """SwiGLU whose first two layers are one."""

    def __init__(self, dense: nn.Module, leaf: Leaf) -> None:
        super().__init__()
        self.w13 = leaf.of(dense.w3, dense.w1)
        self.w2 = leaf.of(dense.w2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.w13(x).chunk(2, dim=-1)
        return self.w2(torch.nn.functional.silu(gate) * value)


class RotaryHooks:
    """During a forward of the transformer, gives its quantized attentions the kernel's rotation."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._made: dict[Any, torch.Tensor] = {}

    @classmethod
    def install(cls, transformer: nn.Module) -> None:
        """Hook a transformer."""
        hooks = cls()
        transformer.register_forward_pre_hook(hooks.begin)
        transformer.register_forward_hook(hooks.end, always_call=True)

    def begin(self, transformer: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook its attentions."""
        for module in transformer.modules():
            if isinstance(module, EmulatedAttention):
                handle = module.register_forward_pre_hook(self.replace, with_kwargs=True)
                self._handles.append(handle)

    def replace(self, module, args, kwargs):
        """Pass on sine and cosine in the kernel's layout, made once for each rotation."""
        rotation = args[2]
        key = (rotation.data_ptr(), rotation.shape)
        if key not in self._made:
            sin_cos = rotation[:, :, 0, :, 1]  # (B or 1, S, D/2, 2)
            missing = -rotation.shape[1] % ROWS_PADDED
            padded = torch.nn.functional.pad(sin_cos, (0, 0, 0, 0, 0, missing))
            self._made[key] = pack_rotations(padded)
        return (*args[:2], self._made[key], *args[3:]), kwargs

    def end(self, transformer: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Leave no hook behind."""
        while self._handles:
            self._handles.pop().remove()
        self._made.clear()


# ---- the patcher ----


class EmulatedZImagePatcher(comfy.model_patcher.ModelPatcher):
    """Overrides what `ZImageModelPatcher` overrides, and keeps what it keeps.

    Attributes:
        svdq_backup: Parameters of packed layers that hold patches now, by the key of the layer's
            `qweight`; clones share it.
    """

    def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False):
        super().__init__(model, load_device, offload_device, size, weight_inplace_update=False)
        self.svdq_backup: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}

    def clone(self):
        made = super().clone()
        made.svdq_backup = self.svdq_backup
        return made

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        known = set(comfy.lora.model_lora_keys_unet(self.model).values())
        with self.use_ejected():
            taken = [key for key in patches if key in known]
            for key in taken:
                name, *rest = (key,) if isinstance(key, str) else key
                offset, function = (*rest, None, None)[:2]
                entry = (strength_patch, patches[key], strength_model, offset, function)
                self.patches[name] = [*self.patches.get(name, []), entry]
            self.patches_uuid = uuid.uuid4()
            return taken

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        assert not inplace_update
        if not self.patches or (key not in self.patches and not key.endswith(QWEIGHT)):
            return
        layer = comfy.utils.get_attr(self.model, key.rpartition(".")[0])
        if isinstance(layer, SVDQW4A4Linear):
            self._patch_packed(key, layer)
        else:
            super().patch_weight_to_device(key, device_to, inplace_update)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self._unpatch_packed(device_to)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        with self.use_ejected():
            self._unpatch_packed(device_to)
            return super().partially_unload(device_to, memory_to_free, force_patch_weights)

    def _unpatch_packed(self, device_to):
        for key, factors in self.svdq_backup.items():
            layer = comfy.utils.get_attr(self.model, key.removesuffix(QWEIGHT))
            down, up = (f if device_to is None else f.to(device_to) for f in factors)
            layer.proj_down, layer.proj_up = down, up
        self.svdq_backup.clear()

    def _patch_packed(self, key: str, layer: SVDQW4A4Linear) -> None:
        stem = key.removesuffix(QWEIGHT)
        parts = [stem]
        if stem.endswith(".w13"):
            parts = [f"{stem.removesuffix('.feed_forward.w13')}.{half}" for half in HALVES]
        height = layer.out_features // len(parts)
        downs, ups = [], []
        for index, part in enumerate(parts):
            for entry in self.patches.get(f"{part}.weight", []):
                begin = index * height if entry[3] is None else entry[3][1]
                down, up = _pair(entry, begin, layer.out_features)
                downs.append(down)
                ups.append(up)
        if not downs:
            return
        self.svdq_backup.setdefault(key, (layer.proj_down, layer.proj_up))
        for name, side, added in (
            ("proj_down", LowRankSide.DOWN, torch.cat(downs)),
            ("proj_up", LowRankSide.UP, torch.cat(ups, dim=1)),
        ):
            factor = getattr(layer, name)
            base = pack.unpack_lowrank(factor, side)
            axis = 0 if side is LowRankSide.DOWN else 1
            joined = torch.cat([base, added.to(base)], dim=axis)
            setattr(layer, name, nn.Parameter(pack.pack_lowrank(joined, side)))


def _pair(entry: tuple[Any, ...], begin: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A patch's scaled down (r, in), and its up in the rows of the whole layer (rows, r)."""
    strength, adapter, *_ = entry
    assert isinstance(adapter, LoRAAdapter)
    up, down, alpha, *_ = adapter.weights
    scale = strength if alpha is None else strength * alpha / down.shape[0]
    placed = up.new_zeros(rows, up.shape[1])
    placed[begin : begin + up.shape[0]] = up
    return scale * down, placed
