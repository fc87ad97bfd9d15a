"""The grid of a model: blocks by kinds of layer, and what lies outside of the blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenlora import _core

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

__all__ = ["Grid", "GridColumns", "GridRow", "kind_of"]

_BLOCK = re.compile(r"([a-z_]+)\.([0-9]+)\.(.+)")
_ROWS: Mapping[str, str] = {
    # Qwen-Image
    "attn.to_q": "image q",
    "attn.to_k": "image k",
    "attn.to_v": "image v",
    "attn.to_out.0": "image attn out",
    "img_mlp.net.0.proj": "image MLP up",
    "img_mlp.net.2": "image MLP down",
    "img_mod.1": "image modulation",
    "attn.add_q_proj": "text q",
    "attn.add_k_proj": "text k",
    "attn.add_v_proj": "text v",
    "attn.to_add_out": "text attn out",
    "txt_mlp.net.0.proj": "text MLP up",
    "txt_mlp.net.2": "text MLP down",
    "txt_mod.1": "text modulation",
    "attn.norm_q": "image q norm",
    "attn.norm_k": "image k norm",
    "attn.norm_added_q": "text q norm",
    "attn.norm_added_k": "text k norm",
    # Z-Image
    "attention.to_q": "q",
    "attention.to_k": "k",
    "attention.to_v": "v",
    "attention.to_out.0": "attention out",
    "feed_forward.w1": "MLP gate",
    "feed_forward.w3": "MLP up",
    "feed_forward.w2": "MLP down",
    "adaLN_modulation.0": "modulation",
    "attention.norm_q": "q norm",
    "attention.norm_k": "k norm",
    "attention_norm1": "attention norm 1",
    "attention_norm2": "attention norm 2",
    "ffn_norm1": "MLP norm 1",
    "ffn_norm2": "MLP norm 2",
}
"""Names of rows in their order, by the end of the modules' paths."""
_LISTS: Mapping[str, str] = {
    "transformer_blocks": "block",
    "layers": "layer",
    "noise_refiner": "noise",
    "context_refiner": "context",
}
"""Names of lists of blocks, in their order."""
_OUTSIDE: Mapping[str, str] = {
    "img_in": "image in",
    "txt_in": "text in",
    "txt_norm": "text norm",
    "time_text_embed.timestep_embedder.linear_1": "time 1",
    "time_text_embed.timestep_embedder.linear_2": "time 2",
    "time_text_embed.addition_t_embedding": "layer embedding",
    "norm_out.linear": "modulation out",
    "proj_out": "image out",
    "all_x_embedder.2-1": "image in",
    "cap_embedder.0": "text norm",
    "cap_embedder.1": "text in",
    "t_embedder.mlp.0": "time 1",
    "t_embedder.mlp.2": "time 2",
    "all_final_layer.2-1.adaLN_modulation.1": "modulation out",
    "all_final_layer.2-1.linear": "image out",
}
"""Names of modules outside of the blocks, in their order."""


_KINDS: Mapping[str, str] = {
    "attn": "attention",
    "mlp": "MLPs",
    "mod": "modulation",
    "rest": "outside of the blocks",
}
"""Names of kinds of layer, by the names that factors have."""


@dataclass(frozen=True)
class GridRow:
    """A kind of layer: its name, and the end of its modules' paths."""

    label: str
    tail: str


@dataclass(frozen=True)
class GridColumns:
    """A list of blocks: its name, its path, and how many blocks it has."""

    label: str
    path: str
    count: int


@dataclass(frozen=True)
class Grid:
    """The places of a model's modules in a picture.

    Attributes:
        rows: Kinds of layer.
        columns: Lists of blocks.
        outside: (name, path) of modules outside of the blocks.
    """

    rows: tuple[GridRow, ...]
    columns: tuple[GridColumns, ...]
    outside: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, paths: Iterable[str], trained: Collection[str]) -> Grid:
        """Lay out a model's modules; norms and tables, which few files train, where they are.

        Args:
            paths: All modules of the model.
            trained: Those to be shown in any case.
        """
        tails: dict[str, bool] = {}
        lists: dict[str, int] = {}
        outside: dict[str, bool] = {}
        for path in paths:
            shown = path in trained or not _is_rare(path)
            found = _BLOCK.fullmatch(path)
            if found is None or found[1] not in _LISTS:
                outside[path] = shown
                continue
            tails[found[3]] = tails.get(found[3], False) or shown
            lists[found[1]] = max(lists.get(found[1], 0), int(found[2]) + 1)
        return cls(
            rows=tuple(
                GridRow(_ROWS.get(tail, tail), tail)
                for tail in _ordered(tails, _ROWS)
                if tails[tail]
            ),
            columns=tuple(
                GridColumns(_LISTS[name], name, lists[name]) for name in _ordered(lists, _LISTS)
            ),
            outside=tuple(
                (_OUTSIDE.get(path, path), path)
                for path in _ordered(outside, _OUTSIDE)
                if outside[path]
            ),
        )

    @property
    def width(self) -> int:
        """How many blocks there are."""
        return sum(columns.count for columns in self.columns)


def kind_of(path: str) -> str:
    """The kind of layer that a module is, in words."""
    found = _core.layer_kinds(path)
    kinds = () if found is None else found[1]
    return next((title for kind, title in _KINDS.items() if kind in kinds), "other layers")


def _is_rare(path: str) -> bool:
    last = path.rpartition(".")[2]
    return "norm" in last or path.endswith(("addition_t_embedding", "cap_embedder.0"))


def _ordered(found: Iterable[str], known: Mapping[str, str]) -> list[str]:
    """Known names in their order, then the others in theirs."""
    found = list(found)
    return [name for name in known if name in found] + [name for name in found if name not in known]
