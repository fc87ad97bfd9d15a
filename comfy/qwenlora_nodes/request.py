"""The request of a node, and the one function that carries all of them out."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwenlora import LoraSet, LoraSpec
from qwenlora.compose.planning import plan_report
from qwenlora.errors import LoraNotFoundError

from . import host, native
from .control import EVERYWHERE, Control
from .node_report import NodeReport

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .rows import Row

__all__ = ["Request", "extend_model"]


@dataclass(frozen=True)
class Request:
    """The request of one node.

    Attributes:
        rows: The rows that are in use.
        modulation: As in `LoraSpec`, for these rows; nodes before and after keep their own.
        offload: Whether block offload is turned on where it is off; False does not change it.
        control: In which blocks and steps these rows act.
    """

    rows: tuple[Row, ...]
    modulation: bool = True
    offload: bool = False
    control: Control = EVERYWHERE

    @property
    def active(self) -> tuple[Row, ...]:
        """The rows that change the model."""
        return tuple(row for row in self.rows if row.active)

    @property
    def fingerprint(self) -> str:
        """Equal for requests that lead to the same model: settings, and each file's identity."""
        loras = [(row.name, row.strength, _identity(row.name)) for row in self.active]
        return json.dumps([loras, self.modulation, self.offload, self.control.fingerprint])

    def find_files(self) -> tuple[str, ...]:
        """Paths of the active rows' files.

        Raises:
            LoraNotFoundError: Files are missing: each is listed with its input and near names.
        """
        paths, missing = [], []
        for row in self.active:
            try:
                paths.append(host.lora_path(row.name))
            except LoraNotFoundError as error:
                missing.append(f"{row.source}: {error}")
        if missing:
            raise LoraNotFoundError("\n".join(missing))
        return tuple(paths)


def _identity(name: str) -> tuple[int, int] | None:
    """A file's identity; None where it is missing, which the node itself will tell."""
    try:
        return host.file_identity(name)
    except LoraNotFoundError:
        return None


def extend_model(model: ModelPatcher, request: Request) -> tuple[ModelPatcher, NodeReport]:
    """A clone of the model with more LoRAs, and the report of what its whole stack will do.

    Where the request is of no effect it is the model itself.
    """
    host.warn_of_rivals()
    if not request.active:
        line = "no LoRA is active here: the model is passed on as it is"
        return model, NodeReport(line, line)
    transformer = host.transformer_of(model)
    before = native.wanted_set(model) or LoraSet.of(options=host.compose_options())
    control = request.control
    everywhere = {
        "modulation": request.modulation,
        "blocks": control.factors(host.count_blocks(transformer)),
        "schedule": control.schedule,
    }
    wanted = before.extended(
        [
            LoraSpec(path, row.strength, **everywhere)
            for path, row in zip(request.find_files(), request.active, strict=True)
        ]
    )
    if request.offload and not host.offloads_blocks(transformer):
        host.warn_once("`cpu_offload` is ignored: this model has no offload but ComfyUI's own")
    elif request.offload:
        wanted = replace(wanted, options=replace(wanted.options, offload=True))
    report = plan_report(transformer, wanted)
    # Text is encoded and models are loaded before the first step asks for them.
    wanted.read_ahead(limit_bytes=host.spare_bytes(), first=len(before.specs))
    text = report.text()
    without = [
        name for name, spec in zip(wanted.names, wanted.specs, strict=True) if not spec.modulation
    ]
    if without:
        text += f"\n  modulation layers are switched off (apply_awq_mod) for: {', '.join(without)}"
    for notice in filter(None, (control.note, host.patches_notice(model))):
        text += f"\n  {notice}"
    extended = host.with_set(model, wanted, transformer, report.added_bytes)
    return extended, NodeReport.of(report, text)
