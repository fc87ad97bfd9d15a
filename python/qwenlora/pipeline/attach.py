"""Attaching: a pipeline gets diffusers' LoRA methods, and loses them again without a trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from qwenlora.compose.compose import reset_loras
from qwenlora.compose.planning import plan_report
from qwenlora.errors import ModelStateError, UnsupportedModelError
from qwenlora.lora_set import NO_LORAS
from qwenlora.model.state import read_default, read_state
from qwenlora.model.transformer import transformer_of
from qwenlora.pipeline.bound import bind, unbind
from qwenlora.pipeline.handle import PipelineLoras
from qwenlora.pipeline.pipeline_methods import PIPELINE_METHODS
from qwenlora.pipeline.roster import ROSTER, Roster
from qwenlora.pipeline.transformer_methods import TRANSFORMER_METHODS
from qwenlora.runtime import ComfyQwenImageWrapper

if TYPE_CHECKING:
    from torch import nn

__all__ = ["attach", "detach"]

_HANDLE = "qwenlora"

PipelineT = TypeVar("PipelineT")


def attach(pipeline: PipelineT, *, eager: bool = False) -> PipelineT:
    """Give a diffusers pipeline's LoRA methods a meaning on its 4-bit transformer.

    The methods are bound on this pipeline and its transformer alone: `load_lora_weights`,
    `set_adapters`, `get_active_adapters`, `get_list_adapters`, `enable_lora`, `disable_lora`,
    `delete_adapters`, `unload_lora_weights`, `save_lora_weights` and those of the transformer. What
    goes beyond them is `pipeline.qwenlora`. A second pipeline over the same transformer shares its
    adapters. Attaching again is no work.

    Args:
        pipeline: A pipeline with a quantized Qwen-Image or Z-Image transformer as
            `pipeline.transformer`.
        eager: Whether a change is composed at once, and its report returned, instead of at the next
            forward.

    Returns:
        The pipeline.

    Raises:
        UnsupportedModelError: It is no pipeline, or its transformer has no 4-bit layers.
        ModelStateError: LoRAs are on the transformer already.
    """
    transformer = _transformer_in(pipeline)
    own = vars(transformer)
    roster = own.get(ROSTER)
    if not isinstance(roster, Roster):
        _require_free(transformer)
        brought = not ComfyQwenImageWrapper.is_on(transformer)
        ComfyQwenImageWrapper.of(transformer)
        roster = own[ROSTER] = Roster(brought_runtime=brought)
    bind(transformer, TRANSFORMER_METHODS)
    bind(pipeline, PIPELINE_METHODS)
    handle = vars(pipeline).get(_HANDLE)
    if not isinstance(handle, PipelineLoras) or not handle.is_of(pipeline, roster):
        vars(pipeline)[_HANDLE] = PipelineLoras(pipeline, roster)
    roster.eager = eager
    return pipeline


def detach(pipeline: object) -> None:
    """Take away all that `attach` brought; of a pipeline that is not attached, nothing.

    With the last pipeline that is attached to it, the transformer loses its LoRAs: it is the base,
    bit for bit.

    Raises:
        ModelStateError: Something else changed the transformer's layers.
    """
    handle = vars(pipeline).get(_HANDLE)
    if not isinstance(handle, PipelineLoras):
        return
    inside: Any = getattr(pipeline, "transformer", None)
    if inside is not None:
        _let_go(transformer_of(inside), pipeline)
    unbind(pipeline, PIPELINE_METHODS)
    del vars(pipeline)[_HANDLE]


def _let_go(transformer: nn.Module, pipeline: object) -> None:
    """Take the LoRAs and the methods away, unless another pipeline is attached, too."""
    roster = vars(transformer).get(ROSTER)
    if not isinstance(roster, Roster) or _others(roster, pipeline):
        return
    reset_loras(transformer)
    unbind(transformer, TRANSFORMER_METHODS)
    del vars(transformer)[ROSTER]
    if roster.brought_runtime:
        ComfyQwenImageWrapper.remove(transformer)


def _others(roster: Roster, pipeline: object) -> list[PipelineLoras]:
    """The handles of other living pipelines."""
    return [handle for handle in list(roster.sharers) if handle.is_of_another(pipeline)]


def _transformer_in(pipeline: object) -> nn.Module:
    """The transformer of what was given, which is looked at closely."""
    if isinstance(pipeline, torch.nn.Module):
        raise UnsupportedModelError(
            f"attach takes a pipeline, not a {type(pipeline).__name__}"
            "\nhint: pass the pipeline around it, or use qwenlora.compose_loras on it"
        )
    inside: Any = getattr(pipeline, "transformer", None)
    kind = type(pipeline)
    if inside is None:
        raise UnsupportedModelError(
            f"a {kind.__name__} has no transformer\nhint: pass a diffusers pipeline"
        )
    # `bind` needs both.
    if not hasattr(pipeline, "__dict__") or not hasattr(kind, "__weakref__"):
        raise UnsupportedModelError(
            f"a {kind.__name__} cannot carry methods of its own\nhint: pass a diffusers pipeline"
        )
    transformer = transformer_of(inside)
    # Looks for its slots, and refuses what is not understood.
    plan_report(transformer, NO_LORAS)
    return transformer


def _require_free(transformer: nn.Module) -> None:
    """Check that no LoRAs are there that have no names."""
    if getattr(transformer, "peft_config", None):
        raise ModelStateError(
            "PEFT's adapters are on the transformer\nhint: call unload_lora_weights first"
        )
    listed = vars(transformer).get("get_list_adapters")
    theirs = listed() if callable(listed) else ()
    if theirs:
        raise ModelStateError(
            f"something else has LoRAs on the transformer: {', '.join(map(str, theirs))}"
            "\nhint: unload them by the methods that loaded them, and attach then"
        )
    has_list = ComfyQwenImageWrapper.is_on(transformer) and (
        ComfyQwenImageWrapper.of(transformer).loras
    )
    if has_list or read_state(transformer).records or read_default(transformer).key != NO_LORAS.key:
        raise ModelStateError(
            "LoRAs without a name are on the transformer"
            "\nhint: call reset_loras, or empty the wrapper's `loras`, and attach then"
        )
