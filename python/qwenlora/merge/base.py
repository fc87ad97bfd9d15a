"""The base of a merge: a checkpoint, 16-bit or quantized, that adapters' weights are read from.

Its headers say what it holds. A module's weight is read when its slot is merged, and not kept.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

import torch

from qwenlora.errors import LoraFileError, OtherModelError
from qwenlora.merge.base_layer import layer_target
from qwenlora.merge.base_weight import FileWeight, JoinedWeight, Segment
from qwenlora.merge.known import known_slots
from qwenlora.packing.layout import MODULATION_PLANES, RowOrder
from qwenlora.plan.documents import SlotKind
from qwenlora.source.checkpoint import Checkpoint
from qwenlora.source.module_names import names_of
from qwenlora.weight.base_weight import BaseWeight

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from qwenlora.delta.adapters.weight import Weight
    from qwenlora.merge.known import KnownSlot
    from qwenlora.model.target import Target
    from qwenlora.source.checkpoint import StoredTensor

__all__ = ["BaseForm", "MergeBase"]

MODELS = ("qwen-image", "z-image")
"""Models that a base can be of, by their names in plans."""
_FLOATS = ("BF16", "F16", "F32")
"""Dtypes of weights that were not quantized, by safetensors' names."""
_QWEIGHT = "qweight"
_LAYER = (
    _QWEIGHT,
    "wscales",
    "wzeros",
    "smooth_factor",
    "smooth",
    "proj_down",
    "proj_up",
    "lora_down",
    "lora_up",
    "wcscales",
    "wtscale",
    "bias",
)
"""Tensors of a quantized layer that its weight or its bias are made of."""
_NAMES = frozenset((*_LAYER, "weight"))
_FUSED = "to_qkv"
"""How the path of the projection ends that marks Nunchaku's own blocks, if it is one layer."""
_RENAMED = {"feed_forward.w13": "feed_forward.net.0.proj"}
"""ComfyUI-nunchaku's name of a quantized layer of value and gate, in this order, and Nunchaku's.

Of a 16-bit weight of this name nothing tells the order of the rows.
"""
_SCALE_PLANES = (1, 4)
"""Planes of Nunchaku's modulation whose bias holds the 1 of 1 + scale."""


class BaseForm(enum.Enum):
    """The form in which a base stores its weights; its value is how people call it."""

    SIXTEEN_BIT = "16-bit"
    QUANTIZED = "quantized"


class MergeBase:
    """The weights of a checkpoint, by slot.

    Attributes:
        name: What reports call it: the name of its file or folder.
        form: How most of it is stored.
        model: The model that it is of.
        files: Its files.
    """

    def __init__(self, path: Path) -> None:
        """Open it, and look at its headers.

        Raises:
            LoraReadError: It cannot be read.
            LoraFileError: It is malformed, or has a module's tensor twice.
            OtherModelError: It is of no model that is known.
        """
        self.name = path.name or str(path)
        self._checkpoint = Checkpoint(path)
        try:
            self.files = tuple(self._checkpoint.files)
            self.model, self._modules = self._found()
        except BaseException:
            self._checkpoint.close()
            raise
        own = self._modules.values()
        is_quantized = any(_QWEIGHT in tensors for tensors in own)
        self.form = BaseForm.QUANTIZED if is_quantized else BaseForm.SIXTEEN_BIT
        self._is_fused = any(
            path.endswith(_FUSED) and _QWEIGHT in own for path, own in self._modules.items()
        )

    def problem(self, slot: KnownSlot, rows: tuple[int, int]) -> str | None:
        """Say why these rows of a slot have no weight here; None where they have one.

        Args:
            slot: The slot.
            rows: Their first, and the one after their last.
        """
        for path, own in self._holders(slot, rows).items():
            text = self._misfit(slot, path, own)
            if text is not None:
                return text
        return None

    def weight(self, slot: KnownSlot) -> JoinedWeight:
        """The weight of a slot, in the rows for which there is no `problem`."""
        holders = self._holders(slot, (0, slot.row.out_features))
        segments = [
            Segment(begin, end - begin, partial(self._weight_of, slot, path, end - begin))
            for path, (begin, end) in holders.items()
        ]
        return JoinedWeight(slot.row.path, slot.row.in_features, segments)

    def is_quantized(self, slot: KnownSlot, rows: tuple[int, int]) -> bool:
        """Tell if some of these rows are stored quantized."""
        return any(_QWEIGHT in self._modules.get(path, {}) for path in self._holders(slot, rows))

    def has_bias(self, slot: KnownSlot, rows: tuple[int, int]) -> bool:
        """Tell if what holds these rows adds a bias."""
        return any("bias" in self._modules.get(path, {}) for path in self._holders(slot, rows))

    def bias(self, slot: KnownSlot, rows: tuple[int, int]) -> Tensor:
        """(n,) float64: what the model adds to these rows, as it was trained; 0 where nothing."""
        begin, stop = rows
        whole = torch.zeros(slot.row.out_features, dtype=torch.float64)
        for path, (first, end) in self._holders(slot, rows).items():
            own = self._modules.get(path, {})
            if _QWEIGHT in own:
                bias = self._trained_bias(slot, path, end - first)
            else:
                bias = self._checkpoint.read(own["bias"]) if "bias" in own else None
            if bias is not None:
                whole[first:end] = bias.double()
        return whole[begin:stop]

    def value(self, slot: KnownSlot) -> Tensor:
        """A norm's weight (N,), or an embedding's table (entries, dim), as stored."""
        return self._checkpoint.read(self._modules[slot.row.path]["weight"])

    def check_model(self, model: str, name: str) -> None:
        """Check that the base is the model that the sources are for.

        Args:
            model: Its name.
            name: The source's, for the error.

        Raises:
            OtherModelError: It is not.
        """
        if model != self.model:
            raise OtherModelError(
                f"the base `{self.name}` is `{self.model}`, but `{name}` is a LoRA for `{model}`"
            )

    def finish(self) -> None:
        """Check that no file changed meanwhile.

        Raises:
            LoraReadError: One did.
        """
        self._checkpoint.finish()

    def close(self) -> None:
        """Close its files."""
        self._checkpoint.close()

    def _found(self) -> tuple[str, Mapping[str, Mapping[str, str]]]:
        """The model, and by module's name the keys of its tensors by their names."""
        found = {model: _by_module(self._checkpoint.tensors, model) for model in MODELS}
        model = max(found, key=lambda name: sum(map(len, found[name].values())))
        if not any({"weight", _QWEIGHT} & own.keys() for own in found[model].values()):
            raise OtherModelError(
                f"the base `{self.name}` is of no model that is known: it has no weight of"
                " Qwen-Image or Z-Image\nhint: name the transformer's checkpoint"
            )
        return model, {
            path: {name: self._single(path, keys) for name, keys in own.items()}
            for path, own in found[model].items()
        }

    def _single(self, path: str, keys: list[str]) -> str:
        if len(keys) > 1:
            raise LoraFileError(f"the base has `{path}` twice: `{keys[0]}` and `{keys[1]}`")
        return keys[0]

    def _holders(self, slot: KnownSlot, rows: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """The modules that hold some rows: the slot's whole, or its parts, and the rows of each."""
        whole = self._modules.get(slot.row.path, {})
        if len(slot.parts) == 1 or {"weight", _QWEIGHT} & whole.keys():
            return {slot.row.path: (0, slot.row.out_features)}
        begin, stop = rows
        return {
            path: (first, end)
            for path, (first, end) in slot.rows.items()
            if first < stop and begin < end
        }

    def _misfit(self, slot: KnownSlot, path: str, rows: tuple[int, int]) -> str | None:
        keys = self._modules.get(path, {})
        key = keys.get(_QWEIGHT, keys.get("weight"))
        if key is None:
            return f"the base `{self.name}` has no weight of it"
        own = self._checkpoint.tensors[key]
        count = rows[1] - rows[0]
        if _QWEIGHT in keys:
            shapes = _quantized_shapes(count, slot.row.in_features)
        else:
            shapes = _shapes(slot, count)
            if own.dtype not in _FLOATS:
                return f"the base `{self.name}` stores it as {own.dtype}, which is not read"
        if own.shape in shapes:
            return None
        sides = f"{count} x {slot.row.in_features}"
        return f"the base `{self.name}` has a weight of {_sides(own)} for it, not of {sides}"

    def _weight_of(self, slot: KnownSlot, path: str, count: int) -> Weight:
        keys = self._modules[path]
        if _QWEIGHT in keys:
            return BaseWeight.of(self._target(slot, path, count))
        return FileWeight(self._checkpoint, keys["weight"])

    def _target(self, slot: KnownSlot, path: str, count: int) -> Target:
        """A quantized layer, read whole."""
        keys = self._modules[path]
        tensors = {name: self._checkpoint.read(keys[name]) for name in _LAYER if name in keys}
        is_awq = "wzeros" in tensors
        return layer_target(
            slot.row._replace(
                path=path,
                out_features=count,
                kind=(SlotKind.AWQ if is_awq else SlotKind.SVDQ).value,
            ),
            tensors,
            row_order=RowOrder.INTERLEAVED if self._has_planes(slot) else RowOrder.PLANAR,
            is_fused=self._is_fused,
        )

    def _has_planes(self, slot: KnownSlot) -> bool:
        """Tell if rows are interleaved: those of modulations, in Nunchaku's own blocks."""
        return self._is_fused and slot.row.kind == SlotKind.AWQ.value

    def _trained_bias(self, slot: KnownSlot, path: str, count: int) -> Tensor | None:
        """(count,) what a quantized layer adds, without what Nunchaku put into it."""
        bias = BaseWeight.of(self._target(slot, path, count)).true_bias()
        if bias is None or not self._has_planes(slot):
            return bias
        bias = bias.clone()
        bias.view(MODULATION_PLANES, -1)[list(_SCALE_PLANES)] -= 1
        return bias


def _by_module(keys: Iterable[str], model: str) -> dict[str, dict[str, list[str]]]:
    """By module's name and tensor's name the keys of what belongs to a model."""
    known = set(_known_names(model))
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in keys:
        path, _, name = key.rpartition(".")
        if name in _NAMES:
            names = names_of(path if name == "weight" else _renamed(path))
            module = next((own for own in names if own in known), None)
            if module is not None:
                found[module][name].append(key)
    return found


def _renamed(path: str) -> str:
    for end, other in _RENAMED.items():
        if path.endswith(end):
            return path.removesuffix(end) + other
    return path


def _known_names(model: str) -> Iterator[str]:
    for path, slot in known_slots(model).items():
        yield path
        yield from slot.parts


def _shapes(slot: KnownSlot, count: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of what is stored as it was trained."""
    columns = slot.row.in_features
    if slot.row.kind == SlotKind.NORM.value:
        return ((count,),)
    if slot.row.kind == SlotKind.EMBEDDING.value:
        return ((columns, count),)
    return ((count, columns),)


def _quantized_shapes(count: int, columns: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of SVDQuant's 4-bit values, of AWQ's, and of the exact emulation's."""
    return ((count, columns // 2), (count // 4, columns // 2), (count, columns))


def _sides(stored: StoredTensor) -> str:
    return f"{' x '.join(map(str, stored.shape)) or 'one value'} ({stored.dtype})"
