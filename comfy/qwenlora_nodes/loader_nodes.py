"""The nodes that load LoRAs, and what they have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from qwenlora import QwenLoraError

from . import host, native
from .applied import applied_text
from .control import Control
from .inputs import (
    APPLIED_TIP,
    CATEGORY,
    NAME_TIP,
    ROWS_TIP,
    ROWS_TYPE,
    STACK_OUT_TIP,
    AnyInputs,
    Inputs,
    Schema,
    control_inputs,
    model_input,
    name_input,
    stack_input,
    strength_input,
)
from .lora_stack import LORA_STACK, LORA_STACK_INPUT, read_stack, stack_of
from .node_report import with_report
from .request import Request, extend_model
from .rows import InputError, Row, as_row, read_rows

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

__all__ = ["LoraNode", "QwenLoraLoader", "QwenLoraStack", "validate_name"]

_MOST_ROWS = 20


def validate_name(lora_name: object) -> bool | str:
    """Tell if a file is there, whichever way its name is spelled: True, or the reason why not."""
    try:
        row = as_row({"lora_name": lora_name})
        _ = row.name and host.lora_path(row.name)
    except (InputError, QwenLoraError) as error:
        return str(error)
    return True


class LoraNode:
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
    CATEGORY = CATEGORY

    @classmethod
    def request(cls, inputs: Inputs) -> Request:
        """Read the request from the inputs.

        Raises:
            InputError: A value is of no use.
        """
        rows = (*read_stack(inputs.get(LORA_STACK_INPUT)), *cls.rows(inputs))
        return Request(rows, control=Control.read(inputs))

    @classmethod
    def rows(cls, inputs: Inputs) -> tuple[Row, ...]:
        """Read the rows of the node itself.

        Raises:
            InputError: A value is of no use.
        """
        return read_rows(inputs)

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

    def load(self, model: ModelPatcher, **inputs: Any) -> dict[str, Any]:
        """Run the node."""
        model, report = extend_model(model, self.request(inputs))
        return with_report(report, model, report.text)

    load_lora = load_lora_stack = load


class StackNode(LoraNode):
    """A loader that takes the stacks of other packs and makes them.

    Its stack holds what this node applies, out of other stacks included. What nodes before have put
    on the model is left out: it would be applied twice where the model is handed on as well.
    """

    RETURN_TYPES: ClassVar[tuple[str, ...]] = (*LoraNode.RETURN_TYPES, LORA_STACK, "STRING")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = (
        *LoraNode.RETURN_NAMES,
        LORA_STACK_INPUT,
        "applied",
    )
    OUTPUT_TOOLTIPS: ClassVar[tuple[str, ...]] = (
        *LoraNode.OUTPUT_TOOLTIPS,
        STACK_OUT_TIP,
        APPLIED_TIP,
    )

    def load(self, model: ModelPatcher, **inputs: Any) -> dict[str, Any]:
        """Run the node."""
        request = self.request(inputs)
        model, report = extend_model(model, request)
        applied = applied_text(native.wanted_set(model))
        return with_report(report, model, report.text, stack_of(request.rows), applied)

    load_lora = load_lora_stack = load


class QwenLoraLoader(StackNode):
    """One LoRA."""

    DESCRIPTION = "Applies a LoRA to a Nunchaku Qwen-Image or Z-Image model. Chain it for more."
    SEARCH_ALIASES: ClassVar[list[str]] = [
        "load lora",
        "lora loader",
        "lora loader model only",
        "nunchaku lora",
        "qwen image lora",
        "z-image lora",
    ]

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        return {
            "required": {**model_input(), "lora_name": name_input(NAME_TIP)},
            "optional": {"strength": strength_input(), **control_inputs(), **stack_input()},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: object = None) -> bool | str:
        """Check that the file is there."""
        return validate_name(lora_name)

    @classmethod
    def rows(cls, inputs: Inputs) -> tuple[Row, ...]:
        """One row."""
        return (as_row(inputs),)


class QwenLoraStack(StackNode):
    """Several LoRAs."""

    DESCRIPTION = (
        "Applies LoRAs to a Nunchaku Qwen-Image or Z-Image model. Rows without a file, switched"
        " off or of strength 0 are skipped."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = [
        "lora stack",
        "lora stacker",
        "power lora loader",
        "multi lora loader",
        "load lora",
        "nunchaku lora stack",
    ]

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs; our own element in the browser draws the rows."""
        rows = {
            "names": host.lora_names(),
            "min": 1,
            "max": _MOST_ROWS,
            "socketless": True,
            "tooltip": ROWS_TIP,
        }
        shown = {"loras": (ROWS_TYPE, rows), **control_inputs(), **stack_input()}
        return {"required": model_input(), "optional": AnyInputs(shown)}
