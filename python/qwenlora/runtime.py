"""Lazy composition: the LoRAs that a forward wants are composed just before it runs.

A host runs one transformer for many branches, each with its own set in the options that it passes
to the forward; a script sets one default. A forward pre-hook compares what is wanted with what is
applied. So a bypassed branch is bypassed, two branches cannot leak into each other, and nothing
has to be restored.
"""

from __future__ import annotations

import numbers
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qwenlora.compose.bring import bring
from qwenlora.compose.compose import follow_offload
from qwenlora.errors import ModelStateError
from qwenlora.lora_set import NO_LORAS, LoraSet, Unmakeable
from qwenlora.model.lock import lock_of
from qwenlora.model.offload import turn_on
from qwenlora.model.state import EMPTY, read_default, read_state, write_default
from qwenlora.model.subclass import mark_hooked, unmark_hooked
from qwenlora.model.transformer import transformer_of
from qwenlora.spec import ComposeOptions

if TYPE_CHECKING:
    from types import FrameType

    from torch import nn

    from qwenlora.report import ComposeReport
    from qwenlora.spec import Item, MaxRank

__all__ = ["OPTIONS_KEY", "ComfyQwenImageWrapper"]

OPTIONS_KEY = "qwenlora"
"""Key of a branch's `LoraSet` in `transformer_options`; present with an empty set it means base."""

_HOSTS_BASE = LoraSet.of(options=ComposeOptions(device_cache_bytes=0))
"""The base of a forward that has options but no set in them: its host plans the device's memory
without what would be kept there of the stack that is left."""

_ATTRIBUTE = "_qwenlora_runtime"
_BOUND = ("_transformer", "_settled", "_scaled")
"""What a runtime has of its process and of its transformer."""
_SCALE = "scale"
_SCALED = ("attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")
"""Arguments of diffusers' forwards that may hold a factor on all LoRAs, under `scale`."""


class ComfyQwenImageWrapper:
    """One transformer's runtime; `of` gives the same object each time.

    Called like the transformer, whose forward it runs. Which LoRAs a forward gets: the set under
    `transformer_options["qwenlora"]` where that key is present, otherwise `loras`. All strengths
    are times `attention_kwargs["scale"]` where a forward has that, as diffusers has it.

    Attributes:
        loras: The default stack, in any form that `compose_loras` takes as items: append to it, and
            the next forward that carries no set composes it.
        max_rank: As in `compose_loras`, for `loras`.
        options: As in `compose_loras`, for `loras`.
        course: Tells the share of the course of sampling, from 0 to 1, at which a forward is that
            begins. LoRAs with a schedule need it, unless the forward's own set is resolved
            (`LoraSet.at`).
    """

    def __init__(self) -> None:
        self.loras: list[Item] = []
        self.max_rank: MaxRank = None
        self.options = ComposeOptions()
        self.course: Callable[[], float] | None = None
        self._transformer: weakref.ref[nn.Module] | None = None
        self._asked: tuple[object, ...] = ()
        self._settled: tuple[LoraSet | Unmakeable, object, object] | None = None
        self._scaled: tuple[LoraSet, float, LoraSet] | None = None

    @classmethod
    def of(cls, transformer: nn.Module) -> ComfyQwenImageWrapper:
        """The runtime of a transformer; made, and its hooks installed, where there is none.

        Raises:
            UnsupportedModelError: It is no module.
        """
        module = transformer_of(transformer)
        runtime = module.__dict__.get(_ATTRIBUTE)
        if not isinstance(runtime, cls):
            runtime = cls()
            module.__dict__[_ATTRIBUTE] = runtime
        if not _is_hooked(module):
            # None, or what an interrupt left of them.
            _unhook(module)
            mark_hooked(module)
            module.register_forward_pre_hook(_before_forward, with_kwargs=True)
            module.register_forward_hook(_after_forward, with_kwargs=True, always_call=True)
        runtime._bind(module)
        return runtime

    @classmethod
    def remove(cls, transformer: nn.Module) -> None:
        """Take a transformer's runtime and its hooks away; what is composed stays as it is.

        Raises:
            UnsupportedModelError: It is no module.
        """
        module = transformer_of(transformer)
        with lock_of(module):
            if module.__dict__.pop(_ATTRIBUTE, None) is not None:
                _unhook(module)
                unmark_hooked(module)
                if read_state(module) is not EMPTY:
                    follow_offload(module)

    @classmethod
    def is_on(cls, transformer: nn.Module) -> bool:
        """Tell if a transformer has a runtime."""
        return isinstance(transformer_of(transformer).__dict__.get(_ATTRIBUTE), cls)

    @property
    def transformer(self) -> nn.Module:
        """The transformer.

        Raises:
            ModelStateError: It is gone.
        """
        module = self._transformer() if self._transformer is not None else None
        if module is None:
            raise ModelStateError("the transformer of this wrapper is gone")
        return module

    @property
    def report(self) -> ComposeReport:
        """The report of what is in the model now."""
        return read_state(self.transformer).report

    @property
    def vram_margin_gb(self) -> float:
        """Device memory, in GB, that composing must leave free while the old stack is in place."""
        return self.options.margin_bytes / 1e9

    @vram_margin_gb.setter
    def vram_margin_gb(self, value: float) -> None:
        self.options = replace(self.options, margin_bytes=int(value * 1e9))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transformer."""
        return self.transformer(*args, **kwargs)

    def want(self, wanted: LoraSet) -> None:
        """Make a set the default of forwards that carry none; `loras` is emptied.

        Nothing is composed before the next forward, or `reconcile`.
        """
        self.loras[:] = []
        self._asked = ()
        write_default(self.transformer, wanted)

    def reconcile(self, transformer_options: Mapping[str, Any] | None = None) -> None:
        """Bring the transformer to what a forward with these options wants, now.

        For hosts that compile the forward, which then does not run the hooks that were added later.
        """
        with lock_of(self.transformer):
            self._settle(transformer_options)

    def _bind(self, module: nn.Module) -> None:
        if self._transformer is None or self._transformer() is not module:
            self._transformer = weakref.ref(module)
            self._settled = None

    def _settle(self, transformer_options: Mapping[str, Any] | None, scale: float = 1.0) -> None:
        """Compose where what is wanted is not what is applied; the lock is held."""
        module = self.transformer
        wanted = self._wanted(module, transformer_options)
        if isinstance(wanted, LoraSet) and wanted.has_schedule and self.course is not None:
            wanted = wanted.at(self.course())
        # Also without a scale: what was scaled before may hold tensors that nobody needs now.
        wanted = self._times(wanted, scale)
        if isinstance(wanted, LoraSet) and wanted.options.offload:
            # Before the comparison below, which finds the manager that this makes.
            turn_on(module)
        manager = getattr(module, "offload_manager", None)
        _restart(manager)
        state = read_state(module)
        if self._settled == (wanted, manager, state) and self._settled[2] is state:
            return
        if isinstance(wanted, Unmakeable):
            if wanted.key != state.stack:
                raise ModelStateError(
                    "the default stack's tensors were let go: it cannot be made again"
                    "\nhint: call compose_loras again, or reset_loras for the base"
                )
        else:
            hosts = wanted is NO_LORAS and transformer_options is not None
            bring(module, _HOSTS_BASE if hosts else wanted)
        self._settled = (wanted, manager, read_state(module))

    def _wanted(
        self, module: nn.Module, transformer_options: Mapping[str, Any] | None
    ) -> LoraSet | Unmakeable:
        if transformer_options is not None and OPTIONS_KEY in transformer_options:
            wanted = transformer_options[OPTIONS_KEY]
            if wanted is not None and not isinstance(wanted, (LoraSet, Unmakeable)):
                kind = type(wanted).__name__
                raise TypeError(f"`{OPTIONS_KEY}` in the options is a LoraSet, not {kind}")
            return NO_LORAS if wanted is None else wanted
        asked = (*self.loras, self.max_rank, self.options)
        same = len(asked) == len(self._asked) and all(
            mine is theirs for mine, theirs in zip(asked, self._asked, strict=True)
        )
        if not same and (self.loras or self._asked):
            wanted = LoraSet.of(self.loras, max_rank=self.max_rank, options=self.options)
            write_default(module, wanted)
            self._asked = asked
        return read_default(module)

    def _times(self, wanted: LoraSet | Unmakeable, scale: float) -> LoraSet | Unmakeable:
        """The set times a factor; the last one is remembered, since every step asks for it."""
        if scale == 1:
            self._scaled = None
            return wanted
        if isinstance(wanted, Unmakeable):
            raise ModelStateError(
                f"the default stack's tensors were let go: it cannot be made at scale {scale}"
                "\nhint: call compose_loras with other strengths"
            )
        last = self._scaled
        if last is None or last[0] is not wanted or last[1] != scale:
            last = self._scaled = (wanted, scale, wanted.scaled(scale))
        return last[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> ComfyQwenImageWrapper:
        # The copy of the transformer brings its own: it is bound when that runs.
        copied = type(self)()
        copied.loras = list(self.loras)
        copied.max_rank, copied.options, copied.course = self.max_rank, self.options, self.course
        copied._asked = self._asked
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "course": None, **dict.fromkeys(_BOUND)}


def _is_hooked(module: nn.Module) -> bool:
    """Tell if both hooks are there, each with all that it was registered with."""
    before = [key for key, hook in module._forward_pre_hooks.items() if hook is _before_forward]
    after = [key for key, hook in module._forward_hooks.items() if hook is _after_forward]
    return (
        len(before) == len(after) == 1
        and before[0] in module._forward_pre_hooks_with_kwargs
        and after[0] in module._forward_hooks_with_kwargs
        and after[0] in module._forward_hooks_always_called
    )


def _unhook(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook in (_before_forward, _after_forward):
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before_forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    runtime = module.__dict__.get(_ATTRIBUTE)
    if not isinstance(runtime, ComfyQwenImageWrapper):
        return None
    scale, unscaled = _parted(kwargs)
    lock = lock_of(module)
    # Compiled code calls hooks from its own frames: none tells when the forward ends.
    frame = _forward_frame()
    holder = frame or sys._getframe()
    lock.acquire(holder)
    is_settled = False
    try:
        runtime._bind(module)
        runtime._settle(_options_of(args, kwargs), scale)
        is_settled = True
    finally:
        if frame is None or not is_settled:
            lock.release(holder)
    return None if unscaled is kwargs else (args, unscaled)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    # Where the forward was refused, the lock is held for the one around it.
    lock_of(module).release(_forward_frame())


def _forward_frame() -> FrameType | None:
    """The frame that calls the hooks and the forward: it lives as long as the forward does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "torch.nn.modules.module":
        frame = frame.f_back
    return frame


def _options_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any] | None:
    """The host's options: by name, else the first mapping; their position has changed often."""
    options = kwargs.get("transformer_options")
    if options is None:
        options = next((arg for arg in args if isinstance(arg, Mapping)), None)
    return options if isinstance(options, Mapping) else None


def _parted(kwargs: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The factor on all LoRAs, and the arguments without it: a forward would trip over it.

    Raises:
        TypeError: It is no number.
    """
    scale, unscaled = 1.0, kwargs
    for name in _SCALED:
        held = kwargs.get(name)
        if not isinstance(held, Mapping) or _SCALE not in held:
            continue
        own = held[_SCALE]
        if not isinstance(own, numbers.Real):
            raise TypeError(f"`{name}` has a `scale` that is {own!r}: it is a number")
        scale *= float(own)
        rest = {key: value for key, value in held.items() if key != _SCALE}
        unscaled = {**unscaled, name: rest}
    return scale, unscaled


def _restart(manager: Any) -> None:
    """Let offload begin at the first block: an aborted forward leaves its count in between."""
    if getattr(manager, "current_block_idx", 0):
        stream = getattr(manager, "memory_stream", None)
        if stream is not None:
            stream.synchronize()
        manager.current_block_idx = 0
