"""The deployment that paints: each replica has one transformer, and holds some stacks."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ray import serve

from qwenlora import ComfyQwenImageWrapper, ComposeOptions, LoraSet, LoraSpec, cache, errors

from .folder import Folder
from .order import Met, Order, Picture, Refusal
from .pipelines import load_studio

if TYPE_CHECKING:
    from collections.abc import Callable

    from .settings import Settings
    from .stack import Stack

__all__ = ["Painter"]

P = ParamSpec("P")
T = TypeVar("T")

_STATUS: dict[type[errors.QwenLoraError], int] = {
    errors.LoraNotFoundError: 404,
    errors.LoraFileError: 422,
    errors.OtherModelError: 422,
    errors.NothingToApplyError: 422,
    errors.NonFiniteError: 422,
}
"""Errors that a stack's files are to blame for. Any other is the server's, and status 500."""


@dataclass
class HeldStack:
    """A stack that this replica holds: Ray drops the one that was used least lately.

    The deltas themselves are the engine's. Those that nobody asks for any more are the first that
    it drops, within `Settings.cache_bytes`.

    Attributes:
        is_composed: Whether it was composed since it came.
    """

    is_composed: bool = False


@serve.deployment
class Painter:
    """Paints pictures, one after the other."""

    def __init__(self, settings: Settings) -> None:
        """Load the model."""
        self._folder = Folder(settings.folder)
        self._studio = load_studio(settings.pipeline)
        self._wrapper = ComfyQwenImageWrapper.of(self._studio.transformer)
        self._options = ComposeOptions(
            cache_bytes=settings.cache_bytes, device_cache_bytes=settings.device_cache_bytes
        )
        # One thread for the transformer: pictures wait for each other in their order.
        self._brush = ThreadPoolExecutor(1, "brush")
        # And one for files, so that a stack is planned while another one's picture is painted.
        self._files = ThreadPoolExecutor(1, "files")

        @serve.multiplexed(max_num_models_per_replica=settings.stacks)
        async def hold(model_id: str) -> HeldStack:
            return HeldStack()

        self._hold = hold

    async def paint(self, stack: Stack, order: Order) -> Picture | Refusal:
        """Paint a picture, or say why its LoRAs cannot be used.

        Args:
            stack: The LoRAs; the replica holds the stack from now on.
            order: Everything else.
        """
        try:
            wanted = await _in_thread(self._files, self._planned, stack)
            # Without LoRAs there is nothing to hold.
            held = await self._hold(stack.model_id) if stack.loras else HeldStack(is_composed=True)
            return await _in_thread(self._brush, self._painted, wanted, held, order)
        except tuple(_STATUS) as error:
            return Refusal(_status_of(error), str(error))

    def _planned(self, stack: Stack) -> LoraSet:
        """The set of a stack, by the files as they are now.

        Plans of files are kept, so that this takes microseconds. A file that was replaced is
        another one, and is read anew.
        """
        specs = [
            LoraSpec(self._folder.path(name), strength, name=name) for name, strength in stack.loras
        ]
        wanted = LoraSet.of(specs, options=self._options)
        wanted.read_ahead(limit_bytes=self._options.cache_bytes)
        return wanted

    def _painted(self, wanted: LoraSet, held: HeldStack, order: Order) -> Picture:
        """Compose a set and paint; runs in the one thread that touches the transformer."""
        before, started = self._wrapper.report, time.perf_counter()
        self._wrapper.want(wanted)
        self._wrapper.reconcile()
        compose_s, report = time.perf_counter() - started, self._wrapper.report
        if report is before:
            met = Met.IN_PLACE
        else:
            met = Met.HELD if held.is_composed else Met.NEW
        held.is_composed = True
        return Picture(
            png=self._studio.paint(order),
            met=met,
            compose_s=compose_s,
            report=report.summary(),
            kept_bytes=cache.pieces.nbytes + cache.shelved_bytes(on_host=True),
            process=os.getpid(),
        )


async def _in_thread(
    threads: ThreadPoolExecutor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run a function in a pool; one that has not begun is dropped with its request."""
    return await asyncio.wrap_future(threads.submit(work, *args, **kwargs))


def _status_of(error: errors.QwenLoraError) -> int:
    return next(status for kind, status in _STATUS.items() if isinstance(error, kind))
