"""The patcher of an enabled MODEL: takes ComfyUI's patches and hooks as LoRAs of its stack.

Patches are not kept where a patcher's `load` finds them, so nothing reaches a layer twice, and a
change of them moves no weights. They become part of the set that the clone asks for; hooks become
part of the set that one forward asks for.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from comfy.model_patcher import ModelPatcher

from qwenlora import LoraSet, cache
from qwenlora.compose.planning import plan_report
from qwenlora.errors import UnsupportedAdapterError, UnsupportedModelError

from .. import host
from .adapters import MERGED, Patches, check, weight_name
from .loras import Call, loras_of
from .view import names_of, view_of

if TYPE_CHECKING:
    from qwenlora import LoraSpec
    from qwenlora.report import ComposeReport

    _Base = ModelPatcher
else:
    _Base = object

__all__ = [
    "NativeLoras",
    "enable",
    "is_enabled",
    "last_sets",
    "make_enabled",
    "running_set",
    "wanted_set",
]

_LOADER = "native loader"
_HOOK = "LoRA hook"
_BYPASS = "bypass_lora"
_MAX_SETS = 16
"""Sets of hooks that are kept: their strengths may change at every step."""


class _Hooked(NamedTuple):
    """Sets of the hooks that were registered last."""

    loras: dict[Any, tuple[LoraSpec, ...]]
    sets: dict[Any, LoraSet]
    nbytes: dict[LoraSet | None, int]


class NativeLoras(_Base):
    """What an enabled patcher does otherwise than the patcher that it was."""

    _qwenlora_calls: tuple[Call, ...] = ()
    """Calls for one weight each that are no LoRAs yet."""

    _qwenlora_hooked: _Hooked | None = None
    _qwenlora_before: _Hooked | None = None
    """The same of the run before, whose LoRAs are the same objects while something holds them."""

    _qwenlora_ran: LoraSet | None = None
    """The set of the last forward."""

    # ---- patches ----

    def add_patches(
        self, patches: Patches, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """Take patches as a LoRA; returns the keys of those that the model has weights for.

        Raises:
            UnsupportedModelError: Models are being merged.
            UnsupportedAdapterError: A patch is of a kind that cannot be applied.
        """
        taken = self._taken(patches, strength_model)
        if taken:
            calls = (*self._qwenlora_calls, Call(taken, float(strength_patch)))
            if len(taken) > 1:
                _settle(self, calls)
                return list(taken)
            # A node that hands over weight by weight is planned when it is done, since nothing
            # tells if more will come. The first may be a whole file, whose faults belong here.
            if not self._qwenlora_calls:
                _planned(self, calls)
            self._qwenlora_calls = calls
        return list(taken)

    def _taken(self, patches: Patches, strength_model: float) -> dict[Any, Any]:
        names = names_of(self.model)
        taken = {key: value for key, value in patches.items() if weight_name(key) in names}
        check(taken, strength_model)
        return taken

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, Any]:
        """Refuse: ComfyUI merges models by this.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(MERGED)

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, Any]:
        """The state dict; refused under a prefix, by which ComfyUI extracts LoRAs from weights.

        Raises:
            UnsupportedModelError: There is a prefix.
        """
        if filter_prefix is not None:
            raise UnsupportedModelError(MERGED)
        return super().model_state_dict()

    def set_injections(self, key: str, injections: Any) -> None:
        """Take what is put into the model for a run; refuse what ComfyUI's bypass loader puts.

        Raises:
            UnsupportedAdapterError: It is the bypass loader's.
        """
        if key == _BYPASS:
            raise UnsupportedAdapterError(
                "`Load LoRA (Bypass)` cannot reach the packed layers of a Nunchaku model: use"
                " `Load LoRA` instead"
            )
        super().set_injections(key, injections)

    # ---- hooks ----

    def register_all_hook_patches(self, *args: Any, **kwargs: Any) -> Any:
        """Register the hooks of a run; those of the last are held until then, to be the same."""
        if self._qwenlora_hooked is not None:
            self._qwenlora_before, self._qwenlora_hooked = self._qwenlora_hooked, None
        return super().register_all_hook_patches(*args, **kwargs)

    def add_hook_patches(
        self,
        hook: Any,
        patches: Patches,
        strength_patch: float = 1.0,
        strength_model: float = 1.0,
    ) -> list[Any]:
        """Take a hook's patches; kept where ComfyUI keeps them, in its form.

        Raises:
            UnsupportedModelError: A model is to be a hook.
            UnsupportedAdapterError: A patch is of a kind that cannot be applied.
        """
        taken = self._taken(patches, strength_model)
        own = self.hook_patches.setdefault(hook.hook_ref, {})
        for key, value in taken.items():
            offset, function = (None, None) if isinstance(key, str) else (*key[1:], None)[:2]
            entry = (strength_patch, value, strength_model, offset, function)
            own.setdefault(weight_name(key), []).append(entry)
        self._qwenlora_hooked = None
        return list(taken)

    def patch_hooks(self, hooks: Any) -> None:
        """Note which hooks are in force: the next forward asks for their LoRAs."""
        self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        """Note that none are in force."""
        del whitelist_keys_set
        self.current_hooks = None

    def cleanup(self) -> None:
        """End a run: what was kept on the device for the change between hooks is let go."""
        super().cleanup()
        if self.hook_patches:
            cache.clear_devices()

    # ---- the host's bookkeeping ----

    def is_clone(self, other: Any) -> bool:
        """Tell if another patcher is of the same modules, whichever view it has of them."""
        model = getattr(other, "model", None)
        return model is not None and self.model.__dict__ is model.__dict__

    def model_size(self) -> int:
        """Bytes of the model with all LoRAs that it asks for, those of its hooks at once."""
        _settle(self, self._qwenlora_calls)
        return int(super().model_size()) + _hook_bytes(self)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """A clone that is enabled, too."""
        _settle(self, self._qwenlora_calls)
        made = super().clone(*args, **kwargs)
        make_enabled(made)
        # Hooks are of one run; the clone may have others.
        made.size = self.size
        return made


def is_enabled(model: object) -> bool:
    """Tell if ComfyUI's LoRA nodes work on a MODEL."""
    return isinstance(model, NativeLoras)


def enable(model: ModelPatcher) -> ModelPatcher:
    """A clone on which ComfyUI's LoRA nodes work; the model itself where they do already.

    Raises:
        UnsupportedModelError: It is no Nunchaku model that is known.
    """
    if is_enabled(model):
        return model
    return host.branch_of(model, host.transformer_of(model))


def make_enabled(clone: ModelPatcher) -> None:
    """Make a clone that nobody has yet an enabled one."""
    if not is_enabled(clone):
        clone.__class__ = _enabled_class(type(clone))
    clone.model = view_of(clone.model)


@functools.cache
def _enabled_class(patcher_class: type) -> type:
    # Other packs ask for classes by name.
    return type(patcher_class.__name__, (NativeLoras, patcher_class), {"__module__": __name__})


# ---- sets ----


def wanted_set(model: ModelPatcher) -> LoraSet | None:
    """All that a MODEL asks for outside of hooks: our nodes' LoRAs and those of ComfyUI's nodes."""
    return _settle(model, model._qwenlora_calls) if is_enabled(model) else host.set_of(model)


def running_set(model: ModelPatcher) -> LoraSet | None:
    """All that a MODEL asks for at this moment of a run, the LoRAs of hooks in force included."""
    wanted = wanted_set(model)
    if not is_enabled(model):
        return wanted
    if model.hook_patches:
        wanted = _with_hooks(model, wanted, _in_force(model))
    model._qwenlora_ran = wanted
    return wanted


def last_sets(model: ModelPatcher) -> list[LoraSet]:
    """The sets of a MODEL that may be in place: the one it asks for, the last that it ran with."""
    ran = model._qwenlora_ran if is_enabled(model) else None
    return [own for own in (host.set_of(model), ran) if own is not None]


def _settle(model: Any, calls: tuple[Call, ...]) -> LoraSet | None:
    """Make calls a part of the set that a patcher asks for."""
    if not calls:
        return host.set_of(model)
    planned = _planned(model, calls)
    if planned is not None:
        wanted, report = planned
        before = host.set_of(model)
        _warn_of_left_out(report, 0 if before is None else len(before.specs))
        host.put_set(model, wanted, report.added_bytes)
    model._qwenlora_calls = ()
    return host.set_of(model)


def _planned(model: Any, calls: tuple[Call, ...]) -> tuple[LoraSet, ComposeReport] | None:
    """The set that a patcher asks for with calls, and its plan; None where they bring nothing."""
    before = host.set_of(model) or LoraSet.of(options=host.compose_options())
    wanted = before.extended(loras_of(calls, _LOADER))
    if len(wanted.specs) == len(before.specs):
        return None
    return wanted, plan_report(host.transformer_of(model), wanted)


def _warn_of_left_out(report: ComposeReport, first: int) -> None:
    for lora in report.loras[first:]:
        if not lora.complete:
            lost = [skip for skip in lora.skipped if skip.matters]
            host.warn_once(
                f"LoRA `{lora.name}` is applied in part: {len(lost)} of its modules are left out"
                f" ({lost[0].reason})"
            )


def _in_force(model: Any) -> tuple[tuple[Any, float], ...]:
    """The hooks in force that bring LoRAs, and their strengths at this step."""
    hooks = model.current_hooks
    every = () if hooks is None else hooks.hooks
    return tuple(
        (own.hook_ref, own.strength) for own in every if own.hook_ref in model.hook_patches
    )


def _with_hooks(
    model: Any, wanted: LoraSet | None, hooks: tuple[tuple[Any, float], ...]
) -> LoraSet:
    """A set with the LoRAs of hooks at its end, made to be left and come back to."""
    hooked = _hooked_of(model)
    made = hooked.sets.get((wanted, hooks))
    if made is None:
        before = wanted or LoraSet.of(options=host.compose_options())
        # Prompts are run in turns: what is left comes back at the next step.
        before = replace(before, options=replace(before.options, device_cache_bytes=None))
        made = before.extended(
            [
                replace(lora, strength=lora.strength * strength)
                for ref, strength in hooks
                for lora in hooked.loras.setdefault(ref, _loras_of_hook(model, ref))
            ]
        )
        if len(hooked.sets) >= _MAX_SETS:
            hooked.sets.pop(next(iter(hooked.sets)))
        hooked.sets[wanted, hooks] = made
    return made


def _loras_of_hook(model: Any, ref: Any) -> tuple[LoraSpec, ...]:
    calls = []
    for name, entries in model.hook_patches[ref].items():
        for strength, value, _, offset, function in entries:
            key = name if offset is None and function is None else (name, offset, function)
            calls.append(Call({key: value}, strength))
    return tuple(loras_of(calls, _HOOK))


def _hooked_of(model: Any) -> _Hooked:
    if model._qwenlora_hooked is None:
        model._qwenlora_hooked = _Hooked({}, {}, {})
    return model._qwenlora_hooked


def _hook_bytes(model: Any) -> int:
    """Bytes that all hooks of a run add at once to the set besides them."""
    if not model.hook_patches:
        return 0
    wanted, hooked = host.set_of(model), _hooked_of(model)
    found = hooked.nbytes.get(wanted)
    if found is None:
        whole = _with_hooks(model, wanted, tuple((ref, 1.0) for ref in model.hook_patches))
        report = plan_report(host.transformer_of(model), whole)
        _warn_of_left_out(report, 0 if wanted is None else len(wanted.specs))
        found = hooked.nbytes[wanted] = report.added_bytes - host.announced_bytes(model)
    return found
