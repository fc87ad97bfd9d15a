"""The nodes that load LoRAs, and what they have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from qwenlora import QwenLoraError

from . import host
from .control import Control
from .inputs import (
    CATEGORY,
    NAME_TIP,
    ROWS_TIP,
    ROWS_TYPE,
    AnyInputs,
    Inputs,
    Schema,
    control_inputs,
    model_input,
    name_input,
    strength_input,
)
from .node_report import with_report
from .request import Request, extend_model
from .rows import InputError, as_row, read_rows

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
        return Request(read_rows(inputs), control=Control.read(inputs))

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


class QwenLoraLoader(LoraNode):
    """One LoRA."""

    DESCRIPTION = "Applies a LoRA to a Nunchaku Qwen-Image or Z-Image model. Chain it for more."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        return {
            "required": {**model_input(), "lora_name": name_input(NAME_TIP)},
            "optional": {"strength": strength_input(), **control_inputs()},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: object = None) -> bool | str:
        """Check that the file is there."""
        return validate_name(lora_name)

    @classmethod
    def request(cls, inputs: Inputs) -> Request:
        """One row."""
        return Request((as_row(inputs),), control=Control.read(inputs))


class QwenLoraStack(LoraNode):
    """Several LoRAs."""

    DESCRIPTION = (
        "Applies LoRAs to a Nunchaku Qwen-Image or Z-Image model. Rows without a file, switched"
        " off or of strength 0 are skipped."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs; our own element in the browser draws the rows."""
        rows = {
            "names": host.lora_names(),
            "min": 1,
            "max": _MOST_ROWS,
            "tooltip": ROWS_TIP,
        }
        shown = {"loras": (ROWS_TYPE, rows), **control_inputs()}
        return {"required": model_input(), "optional": AnyInputs(shown)}
