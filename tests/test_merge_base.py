"""`qwenlora merge --base`: adapters that need the base weight, merged to plain LoRAs.

What is written is compared with W' - W of the float64 formulas, and with what the source itself
does when it is composed.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from qwenlora import LoraSpec
from qwenlora import _reference as reference
from qwenlora.merge import known
from qwenlora.merge.job import merge_loras
from qwenlora.merge.plan import MergeOptions
from qwenlora.slots.find import find_targets
from qwenlora.weight.base_weight import BaseWeight

from .test_adapters import BLOCK

FLOAT32 = 1e-5
"""Relative error of a delta formed in float32; measured: 1.5e-6."""
COMPOSED = 1e-4
"""Of an output of the model, merged against composed; measured: 1e-5."""
TO_Q, TO_K = f"{BLOCK}.attn.to_q", f"{BLOCK}.attn.to_k"
FC1, FC2, MOD = f"{BLOCK}.img_mlp.net.0.proj", f"{BLOCK}.img_mlp.net.2", f"{BLOCK}.img_mod.1"
PLACES = [TO_Q, FC1, FC2, MOD, "proj_out"]


def random(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Base:
    """A tiny model, its slots, and the weight (N, K) float64 of each module."""

    model: torch.nn.Module
    slots: dict[str, known.KnownSlot]
    weights: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Base:
        real = known.known_slots("qwen-image")
        targets = find_targets(model, {})
        slots = {p: known.KnownSlot(t.row, real[p].parts) for p, t in targets.items() if p in real}
        weights, biases = {}, {}
        for path, slot in slots.items():
            if slot.row.kind in ("svdq", "awq", "linear"):
                own = BaseWeight.of(targets[path])
                whole, bias = own.rows(0, own.rows_total).double(), own.true_bias()
                for part, (begin, end) in slot.rows.items():
                    weights[part], biases[part] = whole[begin:end], bias[begin:end].double()
        return cls(model, slots, weights, biases)

    def dense(self) -> dict[str, torch.Tensor]:
        """As a 16-bit checkpoint stores it, by diffusers' names, but in float32."""
        return {f"{path}.weight": own.float() for path, own in self.weights.items()} | {
            f"{path}.bias": own.float() for path, own in self.trained_biases().items()
        }

    def trained_biases(self) -> dict[str, torch.Tensor]:
        """Nunchaku adds the 1 of 1 + scale to the biases of modulations."""
        biases = {path: own.clone() for path, own in self.biases.items()}
        for path, own in biases.items():
            if path.endswith("_mod.1"):
                own.view(6, -1)[[1, 4]] -= 1
        return biases


@pytest.fixture(scope="module")
def exact(request):

    from .conftest import IMAGE_CHANNELS, TEXT_WIDTH, WIDTH

    del IMAGE_CHANNELS, TEXT_WIDTH, WIDTH
    return None


@pytest.fixture
def base(make_model):
    return Base.of(make_model(num_layers=1))


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As Nunchaku's file stores it."""
    return {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}


@pytest.fixture
def merged(tmp_path):
    """Merges sources at strengths onto a checkpoint; the report and the path."""
    made = iter(range(100))

    def merge(slots, *stack, base=None, cut=None, **options):
        specs = []
        for tensors, strength in stack:
            path = tmp_path / f"source-{next(made)}.safetensors"
            save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path)
            specs.append(LoraSpec(path, strength))
        if isinstance(base, dict):
            own = tmp_path / f"base-{next(made)}.safetensors"
            save_file(base, own)
            base = own
        path = tmp_path / f"merged-{next(made)}.safetensors"
        options = {"dtype": torch.float32, **options}
        settings = MergeOptions(cut=cut, base=base, **options)
        return merge_loras(specs, path, settings, known=slots), path

    return merge


# ---- the kinds, and what they make of a weight ----


def pair(target, rows, columns, *, rank=4, seed=1):
    down, up = random(rank, columns, seed=seed, size=0.1), random(rows, rank, seed=seed + 1)
    up = 0.1 * up
    alpha = torch.tensor(2.0)
    tensors = {
        f"{target}.lora_down.weight": down,
        f"{target}.lora_up.weight": up,
        f"{target}.alpha": alpha,
    }
    return tensors, 2.0 / rank * (up.double() @ down.double())


def dora(target, weight, *, axis):
    tensors, delta = pair(target, *weight.shape)
    adapted = (weight + delta).norm(dim=1 - axis, keepdim=True)
    shape = adapted.shape
    magnitude = (adapted * (1 + 0.05 * random(*shape, seed=3).double())).float()
    tensors[f"{target}.dora_scale"] = magnitude
    return tensors, reference.dora_weight(weight, delta, magnitude.double())


def dora_of_lokr(target, weight):
    rows, columns = weight.shape
    w1, w2 = random(4, 4, seed=4, size=0.2), random(rows // 4, columns // 4, seed=5, size=0.05)
    delta = torch.kron(w1.double(), w2.double())
    magnitude = ((weight + delta).norm(dim=1, keepdim=True) * 1.03).float()
    tensors = {
        f"{target}.lokr_w1": w1,
        f"{target}.lokr_w2": w2,
        f"{target}.alpha": torch.tensor(1.0),
        f"{target}.dora_scale": magnitude,
    }
    return tensors, reference.dora_weight(weight, delta, magnitude.double())


def ia3(target, weight, *, on_input):
    learned = random(weight.shape[1 if on_input else 0], seed=6, size=0.1)
    shape = (1, -1) if on_input else (-1, 1)
    tensors = {
        f"{target}.weight": learned.view(shape),
        f"{target}.on_input": torch.tensor(on_input),
    }
    return tensors, weight * (1 + learned.double()).view(shape)


def glora(target, weight):
    rows, columns = weight.shape
    shapes = {"a1": (columns, 4), "a2": (4, columns), "b1": (rows, 4), "b2": (4, columns)}
    own = {n: random(*s, seed=at, size=0.1) for at, (n, s) in enumerate(shapes.items(), 7)}
    tensors = {f"{target}.{name}.weight": tensor for name, tensor in own.items()}
    tensors[f"{target}.alpha"] = torch.tensor(4.0)
    a1, a2, b1, b2 = (own[name].double() for name in shapes)
    return tensors, weight + b1 @ b2 + weight @ a1 @ a2


def hra(target, weight):
    directions = random(weight.shape[1], 4, seed=11)
    tensors = {f"base_model.model.{target}.hra_u": directions}
    return tensors, reference.hra_weight(weight, directions.double())


def diag_oft(target, weight, *, rescaled=False):
    count, size = weight.shape[0] // 8, 8
    blocks = random(count, size, size, seed=12, size=0.1)
    tensors = {f"{target}.oft_blocks": blocks, f"{target}.alpha": torch.tensor(0.0)}
    skews = blocks.double() - blocks.double().mT
    rescale = torch.ones(weight.shape[0], 1)
    if rescaled:
        rescale = 1 + random(weight.shape[0], 1, seed=13, size=0.05)
        tensors[f"{target}.rescale"] = rescale
    changed = reference.diag_oft_weight(weight, skews)
    return tensors, rescale.double() * changed


def boft(target, weight):
    blocks = random(2, weight.shape[0] // 8, 8, 8, seed=14, size=0.1)
    tensors = {f"{target}.oft_blocks": blocks, f"{target}.alpha": torch.tensor(0.0)}
    return tensors, reference.boft_weight(weight, blocks.double() - blocks.double().mT)


def input_oft(target, weight):
    size = 8
    triangles = random(weight.shape[1] // size, size * (size - 1) // 2, seed=15, size=0.05)
    tensors = {f"base_model.model.{target}.oft_R.weight": triangles}
    skews = torch.stack([reference.skew_of_triangle(row, size) for row in triangles.double()])
    turns = torch.stack([reference.cayley_series(skew) for skew in skews])
    return tensors, reference.input_oft_weight(weight, turns)


KINDS = {
    "DoRA of rows": lambda t, w: dora(t, w, axis=0),
    "DoRA of columns": lambda t, w: dora(t, w, axis=1),
    "DoRA of a LoKr": dora_of_lokr,
    "IA3 of rows": lambda t, w: ia3(t, w, on_input=False),
    "IA3 of columns": lambda t, w: ia3(t, w, on_input=True),
    "GLoRA": glora,
    "HRA": hra,
    "OFT": diag_oft,
    "OFT, rescaled": lambda t, w: diag_oft(t, w, rescaled=True),
    "BOFT": boft,
    "OFT of inputs": input_oft,
}
LOW_RANK = ("GLoRA", "HRA")
