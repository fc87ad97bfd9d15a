"""An attached pipeline's own name for what is beyond diffusers' methods: `pipeline.qwenlora`."""

from __future__ import annotations

import weakref
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qwenlora.compose.compose import applied
from qwenlora.errors import ModelStateError
from qwenlora.model.transformer import transformer_of
from qwenlora.pipeline.roster import roster_of
from qwenlora.runtime import ComfyQwenImageWrapper

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from qwenlora.pipeline.roster import Roster
    from qwenlora.report import ComposeReport, LoraReport

__all__ = ["PipelineLoras"]


class PipelineLoras:
    """The LoRAs of one attached pipeline; the pipeline's own methods change them."""

    def __init__(self, pipeline: object | None, roster: Roster) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._roster = roster
        roster.sharers.add(self)

    @property
    def pipeline(self) -> Any:
        """The pipeline.

        Raises:
            ModelStateError: It is gone.
        """
        pipeline = None if self._pipeline is None else self._pipeline()
        if pipeline is None:
            raise ModelStateError("the pipeline of these LoRAs is gone")
        return pipeline

    def is_of(self, pipeline: object, roster: Roster) -> bool:
        """Tell if it is this pipeline's, and for this transformer."""
        return (
            self._roster is roster and self._pipeline is not None and self._pipeline() is pipeline
        )

    def is_of_another(self, pipeline: object) -> bool:
        """Tell if it is that of another pipeline, which is alive and has it still."""
        own = None if self._pipeline is None else self._pipeline()
        return own is not None and own is not pipeline and vars(own).get("qwenlora") is self

    @property
    def transformer(self) -> nn.Module:
        """The pipeline's transformer.

        Raises:
            ModelStateError: It is not attached.
        """
        transformer = transformer_of(self.pipeline.transformer)
        roster_of(transformer)
        return transformer

    @property
    def wrapper(self) -> ComfyQwenImageWrapper:
        """The transformer's wrapper: its `max_rank` and `options` hold from the next change on."""
        return ComfyQwenImageWrapper.of(self.transformer)

    @property
    def eager(self) -> bool:
        """Whether a change is composed at once, instead of at the next forward."""
        return roster_of(self.transformer).eager

    @eager.setter
    def eager(self, value: bool) -> None:
        roster_of(self.transformer).eager = value

    @property
    def reports(self) -> Mapping[str, LoraReport]:
        """What each loaded adapter has for the transformer, and what is left out, by its plan."""
        loaded = roster_of(self.transformer).adapters.loaded
        return MappingProxyType({name: adapter.report for name, adapter in loaded.items()})

    @property
    def report(self) -> ComposeReport:
        """The report of what is in the transformer now, measured."""
        return applied(self.transformer)

    def compose(self) -> ComposeReport:
        """Compose what is asked for now, instead of at the next forward."""
        self.wrapper.reconcile()
        return self.report

    def __reduce__(self) -> tuple[Any, ...]:
        # Whoever copies or pickles the pipeline knows its copy by the time this is asked for.
        pipeline = None if self._pipeline is None else self._pipeline()
        return (PipelineLoras, (pipeline, self._roster))
