"""The calls that compose, reset and tell what is applied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.compose.bring import bring, fits
from qwenlora.compose.structure import found_structure, structure_of
from qwenlora.errors import ModelStateError
from qwenlora.lora_set import LoraSet, Unmakeable
from qwenlora.model.lock import lock_of
from qwenlora.model.offload import OffloadSwitch
from qwenlora.model.state import EMPTY, read_default, read_state, write_default
from qwenlora.model.subclass import is_marked
from qwenlora.model.transformer import transformer_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from qwenlora.report import ComposeReport
    from qwenlora.spec import ComposeOptions, Item, MaxRank

__all__ = ["applied", "compose_loras", "follow_offload", "reset_loras"]


def compose_loras(
    model: nn.Module,
    loras: Item | Sequence[Item],
    *,
    max_rank: MaxRank = None,
    strict: bool = False,
    options: ComposeOptions | None = None,
) -> ComposeReport:
    """Bring the model to exactly this stack, whatever was applied before.

    The same stack again is no work. An empty stack, or strengths of 0 only, leaves the model
    bit-identical to one never touched.

    Args:
        model: A 4-bit Qwen-Image or Z-Image transformer (or `qwenlora.emulation`'s).
        loras: One item or a list; an item is a path, a state dict, (either, strength), or a
            `LoraSpec`.
        max_rank: Most ranks that the LoRAs may add to a slot; what exceeds it, or the kernels'
            limit of 1024 with the base, is compressed near the optimum and the loss reported.
            None is exact up to the kernels' limit. "auto" weighs each slot's rank against the
            error: all of it is worth 5 % of the slot's energy, half of it half as much; a slot that
            would lose more stays exact (`qwenlora.delta.limit.AUTO_PRICE`).
        strict: Raise where a module would be left out, instead of reporting it.
        options: Everything else.

    Returns:
        What was done.

    Raises:
        LoraReadError: A file cannot be read, or changed meanwhile; `LoraNotFoundError` where there
            is none.
        LoraFileError: A file is malformed; `PickleFileError` where it is a pickle.
        OtherModelError: A LoRA is for another model.
        NothingToApplyError: Nothing of a LoRA can be applied.
        UnsupportedAdapterError: With `strict`, an adapter of a kind that is not supported.
        BrokenPairError: With `strict`, a module whose tensors are incomplete.
        ShapeMismatchError: With `strict`, a delta that does not fit the model.
        EnergyLossError: With `strict`, a delta whose truncation would lose too much.
        RankError: `max_rank` leaves nothing, or a slot has no room.
        ScheduleError: A LoRA has a schedule: see `ComfyQwenImageWrapper.course`.
        NonFiniteError: A composed tensor would hold NaN or infinity.
        UnsupportedModelError: The model has no slots, or it is not known, or not understood.
        ModelStateError: Something else changed the model's slots.
    """
    model = transformer_of(model)
    wanted = LoraSet.of(loras, max_rank=max_rank, options=options)
    with lock_of(model):
        follow_offload(model)
        try:
            report = bring(model, wanted, strict=strict)
        finally:
            if read_state(model) is EMPTY:
                OffloadSwitch.remove(model)
        # Tensors in memory are not kept alive for forwards that may never ask for them again.
        kept = all(source.cacheable for source in wanted.sources)
        write_default(model, wanted if kept else Unmakeable(wanted.key))
        return report


def follow_offload(model: nn.Module) -> None:
    """Have what is composed composed anew where block offload is turned on over it."""
    OffloadSwitch.install(model, _refit)


def _refit(model: nn.Module) -> None:
    """Compose anew what is composed, for the buffers that block offload just made.

    Raises:
        ModelStateError: The set is not known any more, or its tensors in memory were let go.
    """
    with lock_of(model):
        state, wanted = read_state(model), read_default(model)
        is_default = wanted.key == state.stack
        if is_default and isinstance(wanted, LoraSet):
            bring(model, wanted)
        elif not is_default and is_marked(model):
            pass  # The runtime's hook is there: the next forward brings what it wants.
        elif not fits(structure_of(model, state)):
            raise ModelStateError(
                "LoRAs are composed that differ from block to block, and their set or its tensors"
                " were let go: they cannot be composed anew for block offload"
                "\nhint: call reset_loras, turn offload on, and call compose_loras again"
            )


def reset_loras(model: nn.Module) -> ComposeReport:
    """Remove every LoRA: the model is bit-identical to one never touched.

    Raises:
        ModelStateError: Something else changed the model's slots.
    """
    return compose_loras(model, [])


def applied(model: nn.Module) -> ComposeReport:
    """The report of what is in the model now, checked against the model's tensors.

    Raises:
        ModelStateError: Something else changed the model's slots.
    """
    model = transformer_of(model)
    with lock_of(model):
        state = read_state(model)
        # What is remembered was looked at before.
        found_structure(model, state)
        return state.report
