"""Adapter files of every kind and every trainer's spelling, with the weights that they stand for.

Each kind is a function of a module's weight W: it draws an adapter for it, puts its tensors under
the trainer's keys, and gives the float64 weight W' (and bias) of the module with the adapter merged
by the formulas below, which `test_every_kind` compares with those of `qwenlora._reference`. At
strength t a layer must compute W + t (W' - W).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from qwenlora.packing.layout import RowOrder
from qwenlora.plan.documents import SlotKind
from qwenlora.slots.find import find_targets
from qwenlora.weight.base_weight import BaseWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from qwenlora.model.target import Target

__all__ = ["KINDS", "AdapterFile", "Kind", "Merged", "Module", "Stack", "mixed", "modules_of"]

RANK = 4
BLOCK = 8
"""Rows or inputs that a rotation turns together."""


# ---- modules ----

QKV, VALUE_AND_GATE = ("to_q", "to_k", "to_v"), ("w3", "w1")
FUSED = {
    "attn.to_qkv": ("attn", QKV),
    "attn.add_qkv_proj": ("attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
    "attention.to_qkv": ("attention", QKV),
    "attention.fused_module.qkv": ("attention", QKV),
    "attention.qkv": ("attention", QKV),
    "feed_forward.net.0.proj": ("feed_forward", VALUE_AND_GATE),
    "feed_forward.w13": ("feed_forward", VALUE_AND_GATE),
    "feed_forward.net.2": ("feed_forward", ("w2",)),
}
"""Layers that files call by other names: the parent of these, and the names, in equal parts."""


@dataclass(frozen=True, eq=False)
class Module:
    """A module that a file can train.

    Attributes:
        name: Its name in files.
        slot: The path of the layer that holds it.
        row_begin: Its first row in that layer.
        weight: W (N, K) float64; a norm's values (N,).
        bias: (N,) float64: what it puts out at an input of zero; None where it has none.
        kind: The kind of its layer.
        squares: (N, 1) and (1, K) float64: squared norms of its rows and columns before it was
            quantized, as far as they are known; None where it is no matrix.
        kept_bias: (N,) float64: what of its bias the layer has not that adapters are trained on.
    """

    name: str
    slot: str
    row_begin: int
    weight: Tensor
    bias: Tensor | None
    kind: SlotKind
    squares: tuple[Tensor, Tensor] | None = None
    kept_bias: Tensor | None = None

    @property
    def rows(self) -> slice:
        """Its rows in its layer."""
        return slice(self.row_begin, self.row_begin + len(self.weight))


def modules_of(model: nn.Module) -> dict[str, Module]:
    """Every module of a model by its name in files; of a fused layer each third."""
    found = {}
    for path, target in find_targets(model, {}).items():
        if target.kind in (SlotKind.NORM, SlotKind.EMBEDDING):
            weight = getattr(target.module, f"{target.prefix}weight").detach().double()
            name = path.replace(".fused_module.", ".")
            found[name] = Module(name, path, 0, weight, None, target.kind)
            continue
        base = BaseWeight.of(target)
        weight = base.rows(0, base.rows_total).double()
        bias = base.true_bias()
        for name, begin, count in _names(path, len(weight)):
            rows = slice(begin, begin + count)
            own = None if bias is None else bias[rows].double()
            norms = (base.row_norms(begin, count), base.column_norms(begin, count))
            squares = (norms[0].unsqueeze(1), norms[1].unsqueeze(0))
            kept = _ones_of_scales(target)[rows]
            found[name] = Module(name, path, begin, weight[rows], own, target.kind, squares, kept)
    return found


def _ones_of_scales(target: Target) -> Tensor:
    """(N,) float64: the 1 of 1 + scale, which Nunchaku's modulations hold in their bias."""
    ones = torch.zeros(target.row.out_features, dtype=torch.float64)
    if target.row_order is RowOrder.INTERLEAVED:
        planes = ones.view(6, -1)
        planes[1] = planes[4] = 1
    return ones


def _names(path: str, rows: int) -> list[tuple[str, int, int]]:
    """(name in files, first row, rows) of the modules in a layer."""
    for end, (parent, names) in FUSED.items():
        block = path.removesuffix(f".{end}")
        if block != path:
            count = rows // len(names)
            return [(f"{block}.{parent}.{own}", n * count, count) for n, own in enumerate(names)]
    return [(path, 0, rows)]


# ---- formulas, in float64 ----


def dora(weight: Tensor, delta: Tensor, magnitude: Tensor, lengths: Tensor) -> Tensor:
    """Rows, or columns, of W + D of these lengths brought to lengths m: (N,), (N, 1) or (1, K)."""
    wanted = magnitude.double().unsqueeze(1) if magnitude.ndim == 1 else magnitude.double()
    return (weight + delta) * (wanted / lengths)


def glora(weight: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...], scale: float) -> Tensor:
    """W + s (b1 b2 + W a1 a2)."""
    return weight + scale * (b[0].double() @ b[1].double() + weight @ a[0].double() @ a[1].double())


def hra(weight: Tensor, directions: Tensor) -> Tensor:
    """W reflected along each column of (K, r), the first one first."""
    for direction in directions.double().unbind(1):
        unit = direction / direction.norm()
        weight = weight - 2 * torch.outer(weight @ unit, unit)
    return weight


def cayley(skew: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 of blocks (..., b, b)."""
    eye = torch.eye(skew.shape[-1], dtype=torch.float64)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def cayley_series(skew: Tensor) -> Tensor:
    """I + 2Q + 2Q^2 + 2Q^3 + Q^4 of blocks (..., b, b)."""
    powers = [torch.linalg.matrix_power(skew, n) for n in range(5)]
    return sum(factor * power for factor, power in zip((1, 2, 2, 2, 1), powers, strict=True))


def skew_of_triangles(triangles: Tensor, size: int) -> Tensor:
    """Q (n, b, b) of upper triangles, stored by rows."""
    upper = torch.zeros(len(triangles), size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    upper[:, rows, columns] = triangles.double()
    return upper - upper.mT


def diag_oft(weight: Tensor, turns: Tensor, rescale: Tensor | None = None) -> Tensor:
    """Each block of rows times R^T, then each row times its factor."""
    adapted = torch.einsum("nji,njk->nik", turns, weight.unflatten(0, turns.shape[:2]))
    return adapted.flatten(0, 1) * (1 if rescale is None else rescale.double())


def boft(weight: Tensor, turns: Tensor, rescale: Tensor) -> Tensor:
    """The stages (m, n, b, b) of a butterfly on rows, then each row times its factor."""
    size = turns.shape[-1]
    for stage, blocks in enumerate(turns):
        order = [_butterfly_row(place, size, stage) for place in range(len(weight))]
        mixed = torch.einsum("nij,njk->nik", blocks, weight[order].unflatten(0, blocks.shape[:2]))
        weight = torch.empty_like(weight)
        weight[order] = mixed.flatten(0, 1)
    return weight * rescale.double()


def _butterfly_row(place: int, size: int, stage: int) -> int:
    stride = (1 << stage) * size // 2
    pair, within = divmod(place, 2 * stride)
    return pair * 2 * stride + (within % 2) * stride + within // 2


def input_oft(weight: Tensor, turns: Tensor) -> Tensor:
    """The weight of a layer that sees x R per block."""
    return torch.einsum("onk,njk->onj", weight.unflatten(1, turns.shape[:2]), turns).flatten(1)


# ---- kinds ----


@dataclass(frozen=True, eq=False)
class Merged:
    """A module with an adapter merged.

    Attributes:
        weight: W' (N, K) float64.
        bias: b' (N,) float64, or None where it stays.
    """

    weight: Tensor
    bias: Tensor | None = None


class Draw:
    """Random float32 values of a seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=self._generator)

    def factors(self, *shape: int, size: float = 0.05) -> Tensor:
        return 1 + self.normal(*shape, size=size)

    def pair(self, module: Module, share: float = 0.1) -> tuple[Tensor, Tensor]:
        """Down and up whose product has about this share of the weight's norm."""
        rows, columns = module.weight.shape
        down = self.normal(RANK, columns)
        size = share * float(module.weight.norm()) / math.sqrt(rows * columns * RANK)
        return down, self.normal(rows, RANK, size=size)


@dataclass(frozen=True)
class Kind:
    """A kind of adapter as one trainer writes it.

    Attributes:
        name: Its name.
        prefix: Of its keys.
        write: Draws one for a module: its tensors by the ends of their keys, and what it does.
        flat: Whether dots in names are underscores.
        config: The trainer's adapter_config.json; None where it writes none.
        plain_only: Whether quantized layers cannot take it, and all other ones can.
        rows: The number that the rows of its modules are a multiple of.
        exactness: The class that plans give it.
    """

    name: str
    prefix: str
    write: Callable[[Draw, Module], tuple[dict[str, Tensor], Merged]]
    flat: bool = False
    config: Mapping[str, object] | None = None
    plain_only: bool = False
    rows: int = 1
    exactness: str = "exact"

    def fits(self, module: Module) -> bool:
        """Tell if it can be trained on a module."""
        if module.kind in (SlotKind.NORM, SlotKind.EMBEDDING):
            return self.plain_only
        if module.kind in (SlotKind.SVDQ, SlotKind.AWQ) and self.plain_only:
            return False
        return len(module.weight) % self.rows == 0

    def key(self, module: str, end: str) -> str:
        """A tensor's key in a file."""
        name = module.replace(".", "_") if self.flat else module
        return f"{self.prefix}{name}.{end}"


KINDS: dict[str, Kind] = {}
"""Every kind by its name."""


def kind(
    name: str, prefix: str = "transformer.", **options: object
) -> Callable[[Callable], Callable]:
    """Put a function into `KINDS`."""

    def add(write: Callable) -> Callable:
        flat = prefix == LYCORIS
        KINDS[name] = Kind(name, prefix, write, flat=flat, **options)
        return write

    return add


LYCORIS = "lycoris_"
PEFT = "base_model.model."
NORMS = {"exactness": "norms"}


@kind("lora")
def _lora(draw: Draw, module: Module):
    down, up = draw.pair(module)
    tensors = {"lora_A.weight": down, "lora_B.weight": up}
    return tensors, Merged(module.weight + up.double() @ down.double())


def _dora(draw: Draw, module: Module, delta: Tensor, axis: int, *, flat: bool = False):
    """Magnitudes near the lengths of W + D's rows (axis 1) or columns, and what they make of it."""
    # Of the weight before it was quantized, which is what adapters are trained on.
    stored = module.squares
    own = module.weight.square().sum(dim=axis, keepdim=True)
    before = own if stored is None else stored[0 if axis else 1]
    change = (module.weight + delta).square() - module.weight.square()
    lengths = (before + change.sum(dim=axis, keepdim=True)).sqrt()
    magnitude = lengths.float() * draw.factors(*lengths.shape, size=0.03)
    magnitude = magnitude.flatten() if flat else magnitude
    return magnitude, Merged(dora(module.weight, delta, magnitude, lengths))


@kind("dora of rows", "lora_unet_", **NORMS)
def _dora_rows(draw: Draw, module: Module):
    return _dora_of_pair(draw, module, axis=1)


@kind("dora of columns", "lora_unet_", **NORMS)
def _dora_columns(draw: Draw, module: Module):
    return _dora_of_pair(draw, module, axis=0)


def _dora_of_pair(draw: Draw, module: Module, *, axis: int):
    down, up = draw.pair(module)
    alpha = torch.tensor(6.0)
    delta = 6.0 / RANK * (up.double() @ down.double())
    magnitude, merged = _dora(draw, module, delta, axis)
    roles = {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}
    return {**roles, "dora_scale": magnitude}, merged


@kind("dora by peft", PEFT, config={"peft_type": "LORA", "r": RANK, "lora_alpha": 8}, **NORMS)
def _dora_peft(draw: Draw, module: Module):
    down, up = draw.pair(module, 0.05)
    delta = 2 * (up.double() @ down.double())
    magnitude, merged = _dora(draw, module, delta, 1, flat=True)
    roles = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": magnitude}
    return roles, merged


def _lokr_factors(draw: Draw, module: Module, split: int) -> tuple[Tensor, Tensor]:
    rows, columns = module.weight.shape
    w1, w2 = draw.normal(split, split), draw.normal(rows // split, columns // split)
    share = 0.1 * float(module.weight.norm()) / float(w1.norm() * w2.norm())
    return w1, w2 * share


@kind("lokr", LYCORIS)
def _lokr(draw: Draw, module: Module):
    w1, w2 = _lokr_factors(draw, module, 16)
    tensors = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1e10)}
    return tensors, Merged(module.weight + torch.kron(w1.double(), w2.double()))


@kind("dora of rows, small lokr", LYCORIS, **NORMS)
def _dora_small_lokr(draw: Draw, module: Module):
    rows, columns = module.weight.shape
    w1, own = draw.normal(4, 4), draw.normal(rows // 4, 2)
    right = draw.normal(2, columns // 4)
    own = own * 0.1 * float(module.weight.norm()) / float(w1.norm() * (own @ right).norm())
    delta = 3.0 / 2 * torch.kron(w1.double(), own.double() @ right.double())
    magnitude, merged = _dora(draw, module, delta, 1)
    roles = {"lokr_w1": w1, "lokr_w2_a": own, "lokr_w2_b": right, "alpha": torch.tensor(3.0)}
    return {**roles, "dora_scale": magnitude}, merged


def _dora_lokr(draw: Draw, module: Module, axis: int):
    w1, w2 = _lokr_factors(draw, module, 16)
    delta = torch.kron(w1.double(), w2.double())
    magnitude, merged = _dora(draw, module, delta, axis)
    return {"lokr_w1": w1, "lokr_w2": w2, "dora_scale": magnitude}, merged


@kind("dora of rows, lokr", LYCORIS, **NORMS)
def _dora_lokr_rows(draw: Draw, module: Module):
    return _dora_lokr(draw, module, 1)


@kind("dora of columns, lokr", LYCORIS, **NORMS)
def _dora_lokr_columns(draw: Draw, module: Module):
    return _dora_lokr(draw, module, 0)


@kind("dora of rows, loha", LYCORIS, **NORMS)
def _dora_loha(draw: Draw, module: Module):
    rows, columns = module.weight.shape
    halves = [draw.normal(*shape) for shape in ((rows, 2), (2, columns)) * 2]
    product = (halves[0] @ halves[1]) * (halves[2] @ halves[3])
    halves[0] = halves[0] * 0.1 * float(module.weight.norm()) / float(product.norm())
    wide = [half.double() for half in halves]
    magnitude, merged = _dora(draw, module, (wide[0] @ wide[1]) * (wide[2] @ wide[3]), 1)
    roles = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return {**dict(zip(roles, halves, strict=True)), "dora_scale": magnitude}, merged


def _ia3_lycoris(draw: Draw, module: Module, axis: int):
    values = draw.normal(module.weight.shape[axis], size=0.1)
    shape = (-1, 1) if axis == 0 else (1, -1)
    tensors = {"weight": values.view(shape), "on_input": torch.tensor(bool(axis))}
    return tensors, Merged(module.weight * (1 + values.double().view(shape)))


@kind("ia3 of rows", LYCORIS)
def _ia3_rows(draw: Draw, module: Module):
    return _ia3_lycoris(draw, module, 0)


@kind("ia3 of columns", LYCORIS)
def _ia3_columns(draw: Draw, module: Module):
    return _ia3_lycoris(draw, module, 1)


@kind("ia3 of rows by peft", PEFT)
def _ia3_peft_rows(draw: Draw, module: Module):
    values = draw.factors(len(module.weight), 1, size=0.1)
    bias = module.bias
    if bias is not None:
        bias = bias + (bias - module.kept_bias) * (values.flatten().double() - 1)
    return {"ia3_l": values}, Merged(module.weight * values.double(), bias)


@kind("ia3 of columns by peft", PEFT)
def _ia3_peft_columns(draw: Draw, module: Module):
    values = draw.factors(1, module.weight.shape[1], size=0.1)
    return {"ia3_l": values}, Merged(module.weight * values.double())


def _glora_halves(draw: Draw, module: Module) -> tuple[tuple[Tensor, Tensor], ...]:
    rows, columns = module.weight.shape
    size = 0.1 * float(module.weight.norm()) / math.sqrt(rows * columns * RANK)
    b = (draw.normal(rows, RANK, size=size), draw.normal(RANK, columns))
    a = (
        draw.normal(columns, RANK),
        draw.normal(RANK, columns, size=0.1 / math.sqrt(RANK * columns)),
    )
    return a, b


@kind("glora", LYCORIS)
def _glora(draw: Draw, module: Module):
    a, b = _glora_halves(draw, module)
    names = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    tensors = dict(zip(names, (*a, *b), strict=True))
    tensors["alpha"] = torch.tensor(3.0)
    return tensors, Merged(glora(module.weight, a, b, 3.0 / RANK))


@kind("glora, old", LYCORIS)
def _glora_old(draw: Draw, module: Module):
    """Old files hold the right half under the first name."""
    a, b = _glora_halves(draw, module)
    names = ("a2.weight", "a1.weight", "b2.weight", "b1.weight")
    tensors = dict(zip(names, (*a, *b), strict=True))
    return tensors, Merged(glora(module.weight, a, b, 1.0))


@kind("hra", PEFT)
def _hra(draw: Draw, module: Module):
    directions = draw.normal(module.weight.shape[1], RANK)
    return {"hra_u": directions}, Merged(hra(module.weight, directions))


def _diag_oft(draw: Draw, module: Module, *, rescale: bool = False, constraint: float = 0.0):
    rows = len(module.weight)
    blocks = draw.normal(rows // BLOCK, BLOCK, BLOCK, size=0.03)
    most = constraint * float((blocks - blocks.mT).norm())
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(most / rows)}
    skew = (blocks - blocks.mT).double()
    if constraint:
        skew = skew * (float(tensors["alpha"]) * rows / (float(skew.norm()) + 1e-8))
    turns = cayley(skew)
    if rescale:
        tensors["rescale"] = draw.factors(rows, 1, size=0.05)
    return tensors, Merged(diag_oft(module.weight, turns, tensors.get("rescale")))


@kind("diag-oft", LYCORIS)
def _diag_oft_plain(draw: Draw, module: Module):
    return _diag_oft(draw, module)


@kind("diag-oft, rescaled and constrained", LYCORIS)
def _diag_oft_constrained(draw: Draw, module: Module):
    return _diag_oft(draw, module, rescale=True, constraint=0.5)


@kind("boft", LYCORIS, rows=4 * BLOCK)
def _boft(draw: Draw, module: Module):
    rows = len(module.weight)
    blocks = draw.normal(3, rows // BLOCK, BLOCK, BLOCK, size=0.02)
    turns = cayley((blocks - blocks.mT).double())
    rescale = draw.factors(rows, 1, size=0.05)
    tensors = {"oft_blocks": blocks, "rescale": rescale, "alpha": torch.tensor(0.0)}
    return tensors, Merged(boft(module.weight, turns, rescale))


def _oft(draw: Draw, module: Module, turn: Callable, *, count: int = 0, divisor: float = 1.0):
    columns = module.weight.shape[1]
    blocks = count or columns // BLOCK
    stored = draw.normal(blocks, BLOCK * (BLOCK - 1) // 2, size=0.05 * divisor)
    skew = skew_of_triangles(stored, BLOCK) / divisor
    turns = turn(skew).expand(columns // BLOCK, -1, -1)
    return {"oft_R.weight": stored}, Merged(input_oft(module.weight, turns))


OFT = {"peft_type": "OFT", "oft_block_size": BLOCK}


@kind("oft by peft", PEFT, config=OFT | {"use_cayley_neumann": True})
def _oft_neumann(draw: Draw, module: Module):
    return _oft(draw, module, cayley_series)


@kind("oft by peft, solved", PEFT, config=OFT | {"use_cayley_neumann": False})
def _oft_solved(draw: Draw, module: Module):
    return _oft(draw, module, lambda skew: cayley(-skew))


@kind("oft by peft, shared", PEFT, config=OFT | {"block_share": True})
def _oft_shared(draw: Draw, module: Module):
    return _oft(draw, module, cayley_series, count=1)


@kind("oft by onetrainer")
def _oft_onetrainer(draw: Draw, module: Module):
    divisor = 2 * math.sqrt(BLOCK - 1)
    tensors, merged = _oft(draw, module, cayley_series, divisor=divisor)
    return {**tensors, "oft_R.scaled_oft": torch.tensor(True)}, merged


@kind("boft by peft", PEFT, config={"peft_type": "BOFT", "boft_n_butterfly_factor": 1})
def _boft_peft(draw: Draw, module: Module):
    rows, columns = module.weight.shape
    blocks = draw.normal(1, columns // BLOCK, BLOCK, BLOCK, size=0.05)
    scale = draw.factors(rows, 1, size=0.05)
    skew = (blocks[0] - blocks[0].mT).double() / 2
    merged = input_oft(module.weight, cayley(-skew)) * scale.double()
    return {"boft_R": blocks, "boft_s": scale}, Merged(merged)


@kind("full", "diffusion_model.")
def _full(draw: Draw, module: Module):
    size = 0.1 * float(module.weight.norm()) / math.sqrt(module.weight.numel())
    delta = draw.normal(*module.weight.shape, size=size)
    return {"diff": delta}, Merged(module.weight + delta.double())


@kind("set_weight", "diffusion_model.", plain_only=True)
def _set_weight(draw: Draw, module: Module):
    size = 0.1 * float(module.weight.norm()) / math.sqrt(module.weight.numel())
    value = (module.weight + draw.normal(*module.weight.shape, size=size).double()).float()
    return {"set_weight": value}, Merged(value.double())


# ---- files ----


@dataclass(eq=False)
class AdapterFile:
    """A file of adapters of one trainer in the making.

    Attributes:
        config: Its adapter_config.json; None where it has none.
        tensors: By key.
        merged: What it makes of each module, by the module's name.
        kinds: The kind on each module.
    """

    config: Mapping[str, object] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    merged: dict[str, Merged] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, modules: Iterable[Module], seed: int = 0) -> AdapterFile:
        """A file of one kind on those of some modules that it fits."""
        file = cls(KINDS[name].config)
        for number, module in enumerate(modules):
            if KINDS[name].fits(module):
                file.add(name, module, seed=1000 * seed + number)
        return file

    def add(self, name: str, module: Module, *, seed: int) -> None:
        """Put a module of a kind into it."""
        own = KINDS[name]
        tensors, merged = own.write(Draw(seed), module)
        for end, tensor in tensors.items():
            self.tensors[own.key(module.name, end)] = tensor
        self.merged[module.name] = merged
        self.kinds[module.name] = own

    @property
    def replaces(self) -> bool:
        """True where it replaces values."""
        return any(own.plain_only for own in self.kinds.values())

    def save(self, path: Path) -> Path:
        """Write a safetensors file, or PEFT's folder where it has a configuration."""
        tensors = {key: tensor.contiguous().clone() for key, tensor in self.tensors.items()}
        if self.config is None:
            path = path.with_suffix(".safetensors")
            save_file(tensors, str(path))
            return path
        path.mkdir(parents=True, exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(tensors, str(path / "adapter_model.safetensors"))
        return path


def mixed(modules: Iterable[Module], seed: int = 0) -> list[AdapterFile]:
    """Files of all kinds: each module is trained by one, of one kind after the other."""
    files = {name: AdapterFile(own.config) for name, own in KINDS.items()}
    names = itertools.cycle(name for name, own in KINDS.items() if not own.plain_only)
    for number, module in enumerate(modules):
        if KINDS["lora"].fits(module):
            name = next(own for own in names if KINDS[own].fits(module))
        else:
            name = "set_weight"
        files[name].add(name, module, seed=1000 * seed + number)
    return [file for file in files.values() if file.merged]


Stack = Sequence[tuple[AdapterFile, float]]
"""Files with their strengths."""
