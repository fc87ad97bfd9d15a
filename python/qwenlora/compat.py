"""Names that scripts written for the earlier loader import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwenlora.requirements import require

require()

from qwenlora.compose.compose import compose_loras, reset_loras
from qwenlora.spec import ComposeOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from qwenlora.spec import Source

__all__ = ["compose_loras_v2", "reset_lora_v2"]


def compose_loras_v2(
    model: nn.Module,
    lora_configs: Sequence[tuple[Source, float]],
    apply_awq_mod: bool = True,
    **ignored: Any,
) -> bool:
    """Compose (source, strength) pairs, as `compose_loras` does.

    Args:
        model: The transformer.
        lora_configs: Pairs, or tuples that begin with source and strength; what follows is not
            needed any more.
        apply_awq_mod: Whether deltas of the modulation layers are applied.
        **ignored: Settings of the earlier loader's cache, which have no meaning here.

    Returns:
        True: what cannot be applied raises or is in the report.
    """
    items = [(config[0], config[1]) for config in lora_configs]
    compose_loras(model, items, options=ComposeOptions(modulation=apply_awq_mod))
    return True


def reset_lora_v2(model: nn.Module) -> None:
    """Remove every LoRA, as `reset_loras` does."""
    reset_loras(model)
