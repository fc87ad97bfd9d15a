"""The node that saves what a MODEL asks for as one LoRA file."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from qwenlora.errors import NothingToApplyError
from qwenlora.merge.cut import Cut
from qwenlora.merge.job import merge_loras
from qwenlora.merge.plan import MergeOptions
from qwenlora.merge.screen import paint
from qwenlora.words import counted

from . import host, native
from .inputs import CATEGORY, Schema, choice_input, flag_input
from .node_report import NodeReport, with_report
from .rows import InputError

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from qwenlora.merge.report import MergeReport

__all__ = ["QwenLoraMerge"]

_log = logging.getLogger("qwenlora")

_NONE = "None"
_DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MAX_RANK = 4096
_OPTION = re.compile(r"`--([a-z]+)")
"""An option of the command line in a text: the inputs have the same names."""

_MODEL_TIP = "The model whose LoRAs are merged: those of all nodes before."
_PREFIX_TIP = (
    "Folder and beginning of the file's name, in ComfyUI's output folder. What is in `loras` there"
    " is offered by the nodes that load LoRAs. A number is added: no file is replaced."
)
_RANK_TIP = "At most this many ranks for each layer: the best such LoRA. 0 keeps everything."
_ENERGY_TIP = (
    "As few ranks for each layer as keep this share of its energy, as 0.99. 1 keeps everything. Not"
    " together with `rank`."
)
_DTYPE_TIP = "How numbers are stored. 'auto' takes the smallest type that holds those of the LoRAs."
_DIFFS_TIP = (
    "Whether changes of biases and norms are saved, too. ComfyUI reads them; diffusers refuses a"
    " file that has them."
)
_BASE_TIP = (
    "The model's own file, for LoRAs that are made of its weights (DoRA, GLoRA, IA3, HRA, OFT,"
    " BOFT). Without it they are left out, and the report says so."
)


class QwenLoraMerge:
    """The node that saves what a MODEL asks for as one LoRA file."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("What was saved, where, and what was left out.",)
    FUNCTION = "merge"
    CATEGORY = CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Saves the LoRAs that the model has, each at its strength, as one plain LoRA file that"
        " ComfyUI and diffusers read. LoRA hooks are not part of it."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = [
        "merge lora",
        "save lora",
        "combine loras",
        "lora merger",
    ]

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        cut = {"default": 0, "min": 0, "max": _MAX_RANK, "tooltip": _RANK_TIP}
        share = {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.001, "round": 0.0001}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": _MODEL_TIP}),
                "filename_prefix": ("STRING", {"default": "loras/merged", "tooltip": _PREFIX_TIP}),
            },
            "optional": {
                "rank": ("INT", cut),
                "energy": ("FLOAT", {**share, "tooltip": _ENERGY_TIP}),
                "dtype": choice_input(list(_DTYPES), _DTYPE_TIP),
                "diffs": flag_input(True, _DIFFS_TIP),
                "base": choice_input([_NONE, *host.checkpoint_names()], _BASE_TIP),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        """Check that the name leads into the output folder."""
        try:
            host.check_prefix(filename_prefix or "")
        except InputError as error:
            return str(error)
        return True

    def merge(self, model: ModelPatcher, filename_prefix: str, **inputs: Any) -> dict[str, Any]:
        """Run the node."""
        options = _options(**inputs)
        host.transformer_of(model)
        wanted = native.wanted_set(model)
        if wanted is None or not wanted.specs:
            raise NothingToApplyError(
                "this model has no LoRA: there is nothing to merge\nhint: put this node behind the"
                " nodes that load LoRAs"
            )
        output = host.new_output(filename_prefix)
        report = merge_loras(
            wanted,
            output,
            options,
            progress=lambda done, total: host.progress("merge", done, total),
            note=lambda text: _log.info("%s", _in_our_words(text)),
        )
        text = _in_our_words(_text(report, options.cut, output))
        line = text.splitlines()[0]
        _log.log(logging.INFO if report.complete else logging.WARNING, "%s", line)
        return with_report(NodeReport(line, text, report.complete), text, text=[text])


def _options(
    rank: int = 0,
    energy: float = 1.0,
    dtype: str = "auto",
    diffs: bool = True,
    base: str = _NONE,
) -> MergeOptions:
    """What the inputs ask for.

    Raises:
        InputError: They contradict each other.
    """
    if rank and energy < 1:
        raise InputError("`rank` and `energy` are both set: leave one of them at 0 or 1")
    cut = None
    if rank or energy < 1:
        cut = Cut(rank=rank) if rank else Cut(energy=energy)
    path = None if base == _NONE else Path(host.checkpoint_path(base))
    return MergeOptions(cut=cut, dtype=_DTYPES[dtype], diffs=diffs, base=path)


def _text(report: MergeReport, cut: Cut | None, output: Path) -> str:
    count = counted(len(report.loras), "LoRA")
    name = host.listed_name(str(output))
    place = f"as `{name}`" if name != str(output) else "outside of the folders for LoRAs"
    fate = "" if report.complete else "; a part is left out"
    return f"{count} saved {place}{fate}\n{paint(report, cut)}".rstrip()


def _in_our_words(text: str) -> str:
    return _OPTION.sub(r"`\1", text)
