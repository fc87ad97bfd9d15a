"""Compares the deltas that the emulated model holds with the expected ones.

Two measures per layer, each ‖measured - expected‖ / ‖expected‖ in the Frobenius norm:

- slot: the low-rank branch unpacked and multiplied out in float64, less the base's;
- output: the layer's bf16 output less that of the same layer without LoRAs, on the same frozen
  input. Both share the int4 part to the bit (it does not depend on the low-rank branch), so that
  the difference is the LoRA's term and the rounding of two bf16 outputs.

The linears of an MLP run inside a fused function. The second is measured through that function,
with the same first linear on both sides; the first, whose output the function keeps to itself,
through the two halves that the function calls.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from qwenlora.demo.model import forward
from qwenlora.emulation import (
    AWQW4A16Linear,
    EmulatedQwenImageTransformer,
    SVDQW4A4Linear,
    fused_gelu_mlp,
)
from qwenlora.emulation.dense import dense_layers
from qwenlora.packing.layout import MODULATION_PLANES, LowRankSide
from qwenlora.packing.pack import unpack_lowrank
from qwenlora.slots.branch import BRANCH_DOWN, BRANCH_UP

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qwenlora.demo.expected import Deltas

__all__ = ["BOUND", "Errors", "Kind", "Meter"]

BOUND = 1e-2
"""Largest error that bf16 rounding explains: a few roundings of 2**-8 at most, seldom aligned."""

_TOKENS = 64
_MODULATION_ROWS = 8


class Kind(enum.Enum):
    """Kinds of slots."""

    ATTENTION = "attention (svdq)"
    MLP = "mlp (svdq)"
    MODULATION = "modulation (awq)"
    PLAIN = "plain linear"


@dataclass(frozen=True)
class Errors:
    """Errors of one kind of slots; 0 for slots that have to be the base, and are.

    Attributes:
        kind: The kind.
        slots: How many there are.
        carrying: How many of them have to carry a delta.
        slot: Worst error of a slot's tensors.
        output: Worst error of a layer's output.
    """

    kind: Kind
    slots: int
    carrying: int
    slot: float
    output: float

    @property
    def within_bound(self) -> bool:
        """True where bf16 rounding explains both errors; NaN does not pass."""
        return self.slot <= BOUND and self.output <= BOUND


class Meter:
    """Compares a model with one that was never touched."""

    def __init__(self, base: EmulatedQwenImageTransformer) -> None:
        self._base = base
        self._base_output = forward(base)
        self._base_stored = {path: _stored(base.get_submodule(path)) for path, _ in _slots(base)}

    def errors(
        self,
        model: EmulatedQwenImageTransformer,
        expected: Deltas,
        kinds: Sequence[Kind] = tuple(Kind),
    ) -> list[Errors]:
        """Measure every slot of these kinds, in their order."""
        found: dict[Kind, list[tuple[bool, float, float]]] = {kind: [] for kind in kinds}
        left = set(expected)
        for path, kind in _slots(self._base):
            members = dense_layers(path)
            left.difference_update(members)
            if kind not in found:
                continue
            wanted = self._wanted(path, members, expected)
            if wanted is None:
                found[kind].append((False, *self._untouched(model, path)))
            else:
                found[kind].append((True, *self._carried(model, path, wanted)))
        assert not left, f"no slot stands for {sorted(left)}"
        return [
            Errors(
                kind=kind,
                slots=len(rows),
                carrying=sum(carries for carries, _, _ in rows),
                slot=_worst(slot for _, slot, _ in rows),
                output=_worst(output for _, _, output in rows),
            )
            for kind, rows in found.items()
        ]

    def moved(self, model: EmulatedQwenImageTransformer) -> float:
        """Distance of the whole model's output from the base's, relative to the base's."""
        return _relative(forward(model), self._base_output)

    def differences(self, model: EmulatedQwenImageTransformer) -> list[str]:
        """List every difference, to the bit, between the base and a model that was reset."""
        base, tensors = _tensors(self._base), _tensors(model)
        names = [name for name in base if name in tensors]
        different = sorted(base.keys() ^ tensors.keys())
        different += [name for name in names if not _same_bits(base[name], tensors[name])]
        different += [
            f"forward hook of {path}" for path, module in model.named_modules() if _hooks(module)
        ]
        if not _same_bits(forward(model), self._base_output):
            different.append("the model's output")
        return different

    def tensors(self) -> int:
        """The number of tensors that `differences` compares."""
        return len(_tensors(self._base))

    def _wanted(self, path: str, members: list[str], expected: Deltas) -> torch.Tensor | None:
        """The dense (out, in) float64 delta of a slot; None where none is expected."""
        if not any(member in expected for member in members):
            return None
        layer = self._base.get_submodule(path)
        outputs, inputs = _sizes(layer)
        empty = torch.zeros(outputs // len(members), inputs, dtype=torch.float64)
        return torch.cat([expected.get(member, empty) for member in members])

    def _carried(
        self, model: EmulatedQwenImageTransformer, path: str, wanted: torch.Tensor
    ) -> tuple[float, float]:
        layer, base = model.get_submodule(path), self._base.get_submodule(path)
        x, output = _run(model, path, layer)
        _, base_output = _run(model, path, base)
        term = output.double() - base_output.double()
        return (
            _relative(_stored(layer) - self._base_stored[path], wanted),
            _relative(term, x.double() @ wanted.T),
        )

    def _untouched(self, model: EmulatedQwenImageTransformer, path: str) -> tuple[float, float]:
        layer, base = model.get_submodule(path), self._base.get_submodule(path)
        tensors, base_tensors = _tensors(layer), _tensors(base)
        same = tensors.keys() == base_tensors.keys() and all(
            _same_bits(tensor, base_tensors[name]) for name, tensor in tensors.items()
        )
        same_output = _same_bits(_run(model, path, layer)[1], _run(model, path, base)[1])
        return (0.0 if same else math.inf, 0.0 if same_output else math.inf)


def _slots(model: nn.Module) -> Iterator[tuple[str, Kind]]:
    for path, module in model.named_modules():
        if isinstance(module, SVDQW4A4Linear):
            yield path, Kind.ATTENTION if ".attn." in path else Kind.MLP
        elif isinstance(module, AWQW4A16Linear):
            yield path, Kind.MODULATION
        elif isinstance(module, nn.Linear):
            yield path, Kind.PLAIN


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Output and input channels."""
    assert isinstance(layer, (SVDQW4A4Linear, AWQW4A16Linear, nn.Linear))
    return layer.out_features, layer.in_features


def _stored(layer: nn.Module) -> torch.Tensor:
    """Multiply out what a layer's low-rank branch holds: (out, in) float64, rows as in files."""
    if isinstance(layer, SVDQW4A4Linear):
        down = unpack_lowrank(layer.proj_down.detach(), LowRankSide.DOWN)  # (R, in)
        up = unpack_lowrank(layer.proj_up.detach(), LowRankSide.UP)  # (out, R)
        return up.double() @ down.double()
    buffers = dict(layer.named_buffers(recurse=False))
    if BRANCH_DOWN not in buffers:
        return torch.zeros((), dtype=torch.float64)
    product = buffers[BRANCH_UP].double() @ buffers[BRANCH_DOWN].double()
    return _planar(product) if isinstance(layer, AWQW4A16Linear) else product


def _run(
    model: EmulatedQwenImageTransformer, path: str, layer: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a layer as the model does, on a frozen input.

    Args:
        model: The model whose other layers are met on the way.
        path: The layer's path.
        layer: The layer of that path, of this or another model.

    Returns:
        What the layer's low-rank branch sees (M, in), and its bf16 output (M, out), rows as in
        files.
    """
    parent, fused, _ = path.rpartition("net.2")
    if fused:
        first = model.get_submodule(f"{parent}net.0.proj")
        assert isinstance(first, SVDQW4A4Linear)
        assert isinstance(layer, SVDQW4A4Linear)
        x = _inputs(first.in_features, _TOKENS, model.dtype)
        return F.gelu(_unfused(first, x), approximate="tanh"), fused_gelu_mlp(x, first, layer)
    rows = _MODULATION_ROWS if isinstance(layer, AWQW4A16Linear) else _TOKENS
    x = _inputs(_sizes(layer)[1], rows, model.dtype)
    if path.endswith("net.0.proj"):
        assert isinstance(layer, SVDQW4A4Linear)
        return x, _unfused(layer, x)
    output: torch.Tensor = layer(x)
    return x, _planar(output.T).T if isinstance(layer, AWQW4A16Linear) else output


def _unfused(layer: SVDQW4A4Linear, x: torch.Tensor) -> torch.Tensor:
    """Output of an MLP's first linear inside the fused function, before GELU."""
    return layer.product(*layer.rounded(x)).to(x.dtype)


def _inputs(channels: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randn(rows, channels, generator=generator).to(dtype)


def _planar(rows: torch.Tensor) -> torch.Tensor:
    """Bring a modulation's rows, (C*6, n) as the quantized layer has them, to (6*C, n)."""
    # (C, 6, n) => (6, C, n)
    return rows.reshape(-1, MODULATION_PLANES, rows.shape[1]).transpose(0, 1).reshape(rows.shape)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    views = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(*views)


def _relative(measured: torch.Tensor, expected: torch.Tensor) -> float:
    difference = measured.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def _worst(errors: Iterator[float]) -> float:
    """The largest error; NaN is worse than any."""
    return max(math.inf if math.isnan(error) else error for error in errors)
