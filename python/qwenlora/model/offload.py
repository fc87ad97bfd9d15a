"""Block offload by the model's own manager: which slots share a buffer, and the buffers' slots.

Nunchaku's manager copies each offloaded block into one of two buffer blocks in every forward,
parameter by parameter and buffer by buffer, by position. So a path's rank is the same over all
offloaded blocks and in both buffer blocks, and a side branch is on all of them or on none. The
manager itself is never rebuilt.
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

import torch

from qwenlora.errors import ModelStateError, UnsupportedModelError
from qwenlora.model.modules import inner_of, submodule_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from qwenlora.model.target import Target

__all__ = ["OffloadLayout", "OffloadSwitch", "offload_of", "turn_on"]

_SWITCH = "set_offload"


def offload_of(model: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> OffloadLayout | None:
    """The model's offload, where it is on; `modules` is what `modules_of` gave for the model.

    Raises:
        UnsupportedModelError: It is on, and its manager is not of the kind that is known.
    """
    manager = getattr(model, "offload_manager", None)
    if manager is None or not getattr(model, "offload", True):
        return None
    known = ("blocks", "buffer_blocks", "num_blocks_on_gpu")
    if not all(hasattr(manager, name) for name in known):
        raise UnsupportedModelError(
            f"the model is offloaded by a {type(manager).__name__}, which is not known"
            "\nhint: turn its offload off"
        )
    first_block = inner_of(manager.blocks[0])
    path = next((path for path, module in modules if module is first_block), None)
    if path is None or not path.endswith(".0"):
        raise UnsupportedModelError("the offloaded blocks are not blocks of this model")
    return OffloadLayout(manager, path.removesuffix("0"))


def turn_on(model: nn.Module) -> None:
    """Turn the model's block offload on, where it is off, with its own defaults.

    Raises:
        UnsupportedModelError: The model has no offload to turn on.
    """
    is_on = bool(getattr(model, "offload", False))
    # A switch that was interrupted says that it is on, and has no manager yet.
    is_half = is_on and getattr(model, "offload_manager", model) is None
    if is_on and not is_half:
        return
    switch = getattr(model, _SWITCH, None)
    if isinstance(switch, OffloadSwitch):
        # Who turns it on from here composes next.
        switch = switch.plain
    if switch is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no block offload\nhint: leave `ComposeOptions.offload` off"
        )
    # Moving or pinning an inference tensor outside that mode leaves it neither one nor the other.
    first = next(model.parameters(), None)
    with torch.inference_mode(first is not None and first.is_inference()):
        if is_half:
            switch(False)
        switch(True)


class OffloadSwitch:
    """The `set_offload` of a composed transformer: what is composed is fitted to the new buffers.

    They are copies of block 0, side branches included. What other blocks have otherwise would not
    come through them: a rank that differs stops the forward, a side branch that differs is lost.
    It lies in the model's `__dict__`, in front of the class's method, while LoRAs are composed.
    """

    def __init__(self, model: nn.Module, refit: Callable[[nn.Module], None], own: Any) -> None:
        """Stand in for what the model's `__dict__` had under that name, or for the class's method.

        Args:
            model: The transformer.
            refit: Composes anew what is composed. A function of a module, so that pickles can name
                it.
            own: What the `__dict__` had; None where it had nothing.
        """
        self._model = weakref.ref(model)
        self._refit = refit
        self._own = own

    @classmethod
    def install(cls, model: nn.Module, refit: Callable[[nn.Module], None]) -> None:
        """Put one in front of a model's own, where it has one that turns block offload on."""
        own = model.__dict__.get(_SWITCH)
        if hasattr(type(model), _SWITCH) and not isinstance(own, cls):
            model.__dict__[_SWITCH] = cls(model, refit, own)

    @classmethod
    def remove(cls, model: nn.Module) -> None:
        """Give the model its own back."""
        found = model.__dict__.get(_SWITCH)
        if isinstance(found, cls):
            del model.__dict__[_SWITCH]
            if found._own is not None:
                model.__dict__[_SWITCH] = found._own

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """Turn block offload on or off, and leave what is composed to the caller.

        Raises:
            ModelStateError: The transformer is gone.
        """
        model = self._alive()
        if self._own is not None:
            return self._own(*args, **kwargs)
        return getattr(type(model), _SWITCH)(model, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Turn block offload on or off, with the arguments of the model's own method.

        Raises:
            QwenLoraError: What is composed cannot be composed anew for it. Offload is off then.
        """
        result = self.plain(*args, **kwargs)
        if getattr(self._alive(), "offload", False):
            try:
                self._refit(self._alive())
            except BaseException:
                self.plain(False)
                raise
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadSwitch:
        model = self._alive()
        copied: nn.Module = memo.get(id(model), model)
        return type(self)(copied, self._refit, copy.deepcopy(self._own, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._alive(), self._refit, self._own)

    def _alive(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ModelStateError("the transformer of this `set_offload` is gone")
        return model


class OffloadLayout:
    """One manager's blocks, by path."""

    def __init__(self, manager: Any, prefix: str) -> None:
        self._manager = manager
        self._prefix = prefix
        self._first = int(manager.num_blocks_on_gpu)

    def holds(self, path: str) -> bool:
        """Tell if the module at this path is in a block that goes through a buffer."""
        if not path.startswith(self._prefix):
            return False
        number, _, rest = path.removeprefix(self._prefix).partition(".")
        return bool(rest) and number.isdigit() and int(number) >= self._first

    def twins(self, target: Target) -> list[Target]:
        """The slots of both buffer blocks that this offloaded slot is copied into."""
        _, _, inner = target.path.removeprefix(self._prefix).partition(".")
        _, _, place = target.module_path.removeprefix(self._prefix).partition(".")
        return [
            target.twin(
                submodule_of(block, place),
                f"buffer {index}: {inner}",
                opened=None if target.opened is None else target.opened.twin(block, place),
            )
            for index, block in enumerate(self._manager.buffer_blocks)
        ]

    def synchronise(self) -> None:
        """Wait until no copy from the host's tensors is under way."""
        stream = getattr(self._manager, "memory_stream", None)
        if stream is not None:
            stream.synchronize()
