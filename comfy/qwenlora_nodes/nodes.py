"""The nodes: schemas, and one function behind them all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from qwenlora import ComposeOptions, LoraSet, LoraSpec, QwenLoraError, read_keys
from qwenlora.compose.planning import plan_report
from qwenlora.errors import LoraNotFoundError
from qwenlora.words import counted

from . import host
from .inputs import (
    CLIP_TIP,
    ENABLED_TIP,
    NAME_TIP,
    SLOT_TIP,
    AnyInputs,
    Inputs,
    Schema,
    clip_input,
    flag_input,
    model_input,
    name_input,
    saved_input,
    strength_input,
)
from .rows import InputError, Row, as_flag, as_row, read_rows
from .saved import (
    ROWS,
    STACK,
    STACK_V1,
    STACK_V2,
    STACK_V3,
    Z_IMAGE_STACK_V1,
    Z_IMAGE_STACK_V2,
    Z_IMAGE_STACK_V3,
    Z_IMAGE_STACK_V4,
    Saved,
)

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

_GROUP_ROWS = 20
_CATEGORY = "qwenlora"
_SAVED_CATEGORY = "Nunchaku"

_PINNED_BYTES = 1 << 30
"""Most bytes of deltas that are kept in host memory, pinned where the model is on a GPU."""


@dataclass(frozen=True)
class Request:
    """The request of one node.

    Attributes:
        rows: The rows that are in use.
        modulation: As in `LoraSpec`, for these rows; nodes before and after keep their own.
        offload: Whether block offload is turned on where it is off; False does not change it.
    """

    rows: tuple[Row, ...]
    modulation: bool = True
    offload: bool = False

    @property
    def active(self) -> tuple[Row, ...]:
        """The rows that change the model."""
        return tuple(row for row in self.rows if row.active)

    @property
    def fingerprint(self) -> str:
        """Equal for requests that lead to the same model: settings, and each file's identity."""
        loras = [(row.name, row.strength, _identity(row.name)) for row in self.active]
        return json.dumps([loras, self.modulation, self.offload])

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


def extend_model(model: ModelPatcher, request: Request) -> tuple[ModelPatcher, str]:
    """A clone of the model with more LoRAs, and the report of what its whole stack will do.

    Where the request is of no effect it is the model itself.
    """
    host.warn_of_rivals(NODE_CLASS_MAPPINGS)
    if not request.active:
        return model, "no LoRA is active here: the model is passed on as it is"
    transformer = host.transformer_of(model)
    # The host plans its device's memory without what we would keep there besides the model, and an
    # offloaded model leaves little host memory to pin.
    options = ComposeOptions(
        progress=host.progress, device_cache_bytes=0, cache_bytes=_PINNED_BYTES
    )
    before = host.set_of(model) or LoraSet.of(options=options)
    wanted = before.extended(
        [
            LoraSpec(path, row.strength, modulation=request.modulation)
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
    if notice := host.patches_notice(model):
        text += f"\n  {notice}"
    return host.with_set(model, wanted, transformer, report.added_bytes), text


# ---- the base of all ----


def _validate_name(lora_name: object) -> bool | str:
    """Tell if a file is there, whichever way its name is spelled: True, or the reason why not."""
    try:
        row = as_row({"lora_name": lora_name})
        _ = row.name and host.lora_path(row.name)
    except (InputError, QwenLoraError) as error:
        return str(error)
    return True


class _LoraNode:
    """The common base of the loaders.

    The server puts what `VALIDATE_INPUTS` says at every input that it takes. So nodes of one LoRA
    take the name alone. Those of rows need all their values to judge one, and do so when they run:
    before the model is loaded, for the server asks `check_lazy_status` first.
    """

    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL", "STRING")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("model", "report")
    OUTPUT_TOOLTIPS: ClassVar[tuple[str, ...]] = (
        "The model with the LoRAs.",
        "What will be applied, and what not.",
    )
    FUNCTION = "load"
    CATEGORY = _CATEGORY

    @classmethod
    def request(cls, inputs: Inputs) -> Request:
        """Read the request from the inputs.

        Raises:
            InputError: A value is of no use.
        """
        return Request(read_rows(inputs))

    @classmethod
    def VALIDATE_INPUTS(cls, **inputs: Any) -> bool | str:
        """Keep the server from judging values one by one."""
        del inputs
        return True

    @classmethod
    def IS_CHANGED(cls, model: object = None, **inputs: Any) -> str:
        """A value that changes with what the output depends on, besides the model."""
        del model
        try:
            return cls.request(inputs).fingerprint
        except InputError as error:
            return str(error)

    def check_lazy_status(self, model: object = None, **inputs: Any) -> list[str]:
        """Check values and files, then ask for the model.

        Raises:
            InputError: A value is of no use.
            LoraNotFoundError: Files are missing.
        """
        del model
        self.request(inputs).find_files()
        return ["model"]

    def load(self, model: ModelPatcher, **inputs: Any) -> tuple[ModelPatcher, str]:
        """Run the node."""
        return extend_model(model, self.request(inputs))

    load_lora = load_lora_stack = load


# ---- ours ----


class QwenLoraLoader(_LoraNode):
    """One LoRA."""

    DESCRIPTION = "Applies a LoRA to a Nunchaku Qwen-Image or Z-Image model. Chain it for more."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        return {
            "required": {**model_input(), "lora_name": name_input(NAME_TIP)},
            "optional": {"strength": strength_input()},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: object = None) -> bool | str:
        """Check that the file is there."""
        return _validate_name(lora_name)

    @classmethod
    def request(cls, inputs: Inputs) -> Request:
        """One row."""
        return Request((as_row(inputs),))


class QwenLoraStack(_LoraNode):
    """Several LoRAs."""

    DESCRIPTION = (
        "Applies LoRAs to a Nunchaku Qwen-Image or Z-Image model. Rows without a file, switched"
        " off or of strength 0 are skipped."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws: a growing group where it can, plain rows otherwise."""
        row = {
            "lora_name": name_input(SLOT_TIP, skippable=True),
            "strength": strength_input(),
            "enabled": flag_input(True, ENABLED_TIP),
        }
        if host.draws_groups():
            names, options = row["lora_name"]
            template = {"required": {**row, "lora_name": ("COMBO", {"options": names, **options})}}
            limits = {"min": 1, "max": _GROUP_ROWS}
            rows: dict[str, Any] = {
                "loras": (
                    "COMFY_DYNAMICGROUP_V3",
                    {"template": template, **limits, "group_name": "LoRA"},
                )
            }
        else:
            numbers = range(1, ROWS + 1)
            rows = {f"{field}_{i}": kind for i in numbers for field, kind in row.items()}
        return {"required": model_input(), "optional": AnyInputs(rows)}


class QwenLoraInspect:
    """The node that shows what a LoRA file holds."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    FUNCTION = "inspect"
    CATEGORY = _CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = "Says what a LoRA file holds and whether it can be applied; needs no model."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        return {"required": {"lora_name": name_input(NAME_TIP)}}

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: str | None = None) -> bool | str:
        """Check that the file is there."""
        return _validate_name(lora_name)

    @classmethod
    def IS_CHANGED(cls, lora_name: str | None = None) -> str:
        """The file's identity."""
        return "" if lora_name is None else json.dumps(host.file_identity(lora_name))

    def inspect(self, lora_name: str) -> dict[str, Any]:
        """Run the node."""
        text = "\n".join(_describe(lora_name, read_keys(host.lora_path(lora_name))))
        return {"ui": {"text": [text]}, "result": (text,)}


def _describe(name: str, plan: Mapping[str, Any]) -> Iterator[str]:
    """Lines for a person from a FilePlan document."""
    yield f"{name}: {plan['verdict']}"
    if plan["reason"]:
        yield f"  {plan['reason']}"
    yield f"  model: {plan['model'] or 'unknown'}, {plan['size_bytes'] / 1e6:.1f} MB"
    kinds = Counter(
        (module["adapter"], module["rank"], module["supported"]) for module in plan["modules"]
    )
    for (adapter, rank, supported), count in kinds.most_common():
        ranked = "" if rank is None else f" of rank {rank}"
        modules = counted(count, "module")
        yield f"  {modules}: {adapter}{ranked}{'' if supported else ', not supported'}"
    reasons = Counter(tensor["reason"] for tensor in plan["tensors"] if tensor["reason"])
    for reason, count in reasons.most_common():
        yield f"  left out: {counted(count, 'tensor')}, {reason}"


# ---- for saved workflows ----


class _SavedStack(_LoraNode):
    """A stack of the pack that ours stands in for, with its inputs in its order."""

    CATEGORY = _SAVED_CATEGORY
    DEPRECATED = True
    FUNCTION = "load_lora_stack"
    DESCRIPTION = (
        "For saved workflows; `LoRA Stack (Nunchaku Qwen-Image, Z-Image)` is the new node."
    )
    saved: ClassVar[Saved]

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        drawn = {name: saved_input(name) for name in cls.saved.today.names}
        return {"required": model_input(), "optional": AnyInputs(drawn)}

    @classmethod
    def request(cls, inputs: Inputs) -> Request:
        """The rows that the count and the switches leave."""
        inputs = cls.saved.restore(inputs)
        modulation = as_flag(inputs.get("apply_awq_mod"), True)
        if not as_flag(inputs.get("stack_enabled"), True):
            return Request((), modulation)
        offload = inputs.get("cpu_offload") == "enable"
        count = str(inputs.get("lora_count"))
        limit = int(count) if count.isdecimal() else None
        return Request(read_rows(inputs, limit=limit), modulation, offload)

    def load(self, model: ModelPatcher, **inputs: Any) -> tuple[ModelPatcher, str]:
        """Run the node."""
        _warn_of_settings(self.saved.restore(inputs))
        return extend_model(model, self.request(inputs))

    load_lora = load_lora_stack = load


class NunchakuQwenImageLoraLoader(_SavedStack):
    """One LoRA."""

    FUNCTION = "load_lora"
    DESCRIPTION = "For saved workflows; `Load LoRA (Nunchaku Qwen-Image, Z-Image)` is the new node."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        names = ("lora_strength", "cpu_offload", "save_precompiled_lora")
        return {
            "required": {**model_input(), "lora_name": name_input(NAME_TIP)},
            "optional": {
                **{name: saved_input(name) for name in names},
                "lora_strength": strength_input(),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: object = None) -> bool | str:
        """Check that the file is there."""
        return _validate_name(lora_name)

    @classmethod
    def request(cls, inputs: Inputs) -> Request:
        """One row; this node never had a switch for the modulation."""
        return Request((as_row(inputs),), offload=inputs.get("cpu_offload") == "enable")

    def load(self, model: ModelPatcher, **inputs: Any) -> tuple[ModelPatcher, str]:
        """Run the node."""
        _warn_of_settings(inputs)
        return extend_model(model, self.request(inputs))

    load_lora = load_lora_stack = load


class NunchakuQwenImageLoraStack(_SavedStack):
    """Ten plain rows."""

    saved = STACK


class NunchakuQwenImageLoraStackV1(_SavedStack):
    """Rows as dicts, which its own frontend drew; plain rows here."""

    saved = STACK_V1


class NunchakuQwenImageLoraStackV2(_SavedStack):
    """Ten plain rows, and a switch for the modulation."""

    saved = STACK_V2


class NunchakuQwenImageLoraStackV3(_SavedStack):
    """Ten plain rows that can be switched off."""

    saved = STACK_V3


class _SavedStackWithClip(_SavedStack):
    """A stack that also passes a text encoder on."""

    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("model", "clip", "report")
    OUTPUT_TOOLTIPS: ClassVar[tuple[str, ...]] = (
        _LoraNode.OUTPUT_TOOLTIPS[0],
        CLIP_TIP,
        _LoraNode.OUTPUT_TOOLTIPS[1],
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        schema = super().INPUT_TYPES()
        return {**schema, "optional": AnyInputs({**clip_input(), **schema["optional"]})}

    def load(  # type: ignore[override]
        self, model: ModelPatcher, clip: object = None, **inputs: Any
    ) -> tuple[ModelPatcher, object, str]:
        """Run the node."""
        model, report = super().load(model, **inputs)
        return model, clip, report

    load_lora = load_lora_stack = load


class NunchakuZImageTurboLoraStackV1(_SavedStackWithClip):
    """Rows as dicts, which its own frontend drew; plain rows here."""

    saved = Z_IMAGE_STACK_V1


class NunchakuZImageTurboLoraStackV2(_SavedStack):
    """Ten plain rows."""

    saved = Z_IMAGE_STACK_V2


class NunchakuZImageTurboLoraStackV3(_SavedStack):
    """Ten plain rows that can be switched off."""

    saved = Z_IMAGE_STACK_V3


class NunchakuZImageTurboLoraStackV4(_SavedStackWithClip):
    """Ten plain rows that can be switched off."""

    saved = Z_IMAGE_STACK_V4


def _warn_of_settings(inputs: Inputs) -> None:
    if as_flag(inputs.get("save_precompiled_lora"), False):
        host.warn_once("`save_precompiled_lora` is ignored: nothing needs to be saved")


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "QwenLoraLoader": QwenLoraLoader,
    "QwenLoraStack": QwenLoraStack,
    "QwenLoraInspect": QwenLoraInspect,
    "NunchakuQwenImageLoraLoader": NunchakuQwenImageLoraLoader,
    "NunchakuQwenImageLoraStack": NunchakuQwenImageLoraStack,
    "NunchakuQwenImageLoraStackV1": NunchakuQwenImageLoraStackV1,
    "NunchakuQwenImageLoraStackV2": NunchakuQwenImageLoraStackV2,
    "NunchakuQwenImageLoraStackV3": NunchakuQwenImageLoraStackV3,
    "NunchakuZImageTurboLoraStackV1": NunchakuZImageTurboLoraStackV1,
    "NunchakuZImageTurboLoraStackV2": NunchakuZImageTurboLoraStackV2,
    "NunchakuZImageTurboLoraStackV3": NunchakuZImageTurboLoraStackV3,
    "NunchakuZImageTurboLoraStackV4": NunchakuZImageTurboLoraStackV4,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "QwenLoraLoader": "Load LoRA (Nunchaku Qwen-Image, Z-Image)",
    "QwenLoraStack": "LoRA Stack (Nunchaku Qwen-Image, Z-Image)",
    "QwenLoraInspect": "Inspect LoRA (Nunchaku Qwen-Image, Z-Image)",
    "NunchakuQwenImageLoraLoader": "Nunchaku Qwen Image LoRA Loader",
    "NunchakuQwenImageLoraStack": "Nunchaku Qwen Image LoRA Stack (Legacy)",
    "NunchakuQwenImageLoraStackV1": "Nunchaku Qwen Image LoRA Stack V1",
    "NunchakuQwenImageLoraStackV2": "Nunchaku Qwen Image LoRA Stack V2",
    "NunchakuQwenImageLoraStackV3": "Nunchaku Qwen Image LoRA Stack V3",
    "NunchakuZImageTurboLoraStackV1": "Nunchaku Z-Image-Turbo LoRA Stack V1",
    "NunchakuZImageTurboLoraStackV2": "Nunchaku Z-Image-Turbo LoRA Stack V2",
    "NunchakuZImageTurboLoraStackV3": "Nunchaku Z-Image-Turbo LoRA Stack V3",
    "NunchakuZImageTurboLoraStackV4": "Nunchaku Z-Image-Turbo LoRA Stack V4",
}
