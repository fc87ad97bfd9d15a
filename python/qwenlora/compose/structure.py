"""A transformer's slots, remembered while nothing of them has changed.

Finding the slots walks thousands of modules and checks every packed tensor. That is needed once;
afterwards a look at who is where tells that everything is as it was left.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import nn

from qwenlora import _core
from qwenlora.blocks import count_blocks
from qwenlora.errors import ModelStateError
from qwenlora.group.group import Group
from qwenlora.group.sets import KeptSets
from qwenlora.model.families import family_of
from qwenlora.model.forwards import unknown_layer
from qwenlora.model.modules import modules_of
from qwenlora.model.offload import offload_of
from qwenlora.model.state import SlotRecord, check_intact, read_state, require_not_overwritten
from qwenlora.model.subclass import plain_class
from qwenlora.model.target import factors_of
from qwenlora.model.values import BASE_VALUES
from qwenlora.packing.layout import LowRankSide
from qwenlora.plan.documents import slot_map
from qwenlora.slots.branch import is_whole
from qwenlora.slots.find import find_targets
from qwenlora.slots.opened import is_as_needed
from qwenlora.slots.whole import slot_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

    import torch
    from torch import Tensor

    from qwenlora.compose.rescale import PlacedStack
    from qwenlora.model.offload import OffloadLayout
    from qwenlora.model.state import AppliedState
    from qwenlora.model.target import Target

__all__ = [
    "Structure",
    "check_branches",
    "composed_bytes",
    "forget_structure",
    "found_structure",
    "remember_structure",
    "structure_of",
]


_MAX_REMEMBERED = 8
"""Results that are remembered with a structure: sets that a host alternates between."""
T = TypeVar("T")


class Structure:
    """The slots of one transformer as they were found, or left by the last composition.

    Attributes:
        targets: The slots by path, in module order.
        layout: Its block offload, where that is on.
        unknown: Path of a quantized layer that no known model has; None where there is none.
        placed: How the last composition lies in its slots, where it consists of groups alone.
        kept: Sets that were left.
    """

    def __init__(self, model: nn.Module, state: AppliedState) -> None:
        modules = modules_of(model)
        self.layout: OffloadLayout | None = offload_of(model, modules)
        self.targets: dict[str, Target] = find_targets(
            model, state.base_ranks, modules=modules, in_flight=state.in_flight
        )
        self.unknown = unknown_layer(self.targets, modules)
        self._code = _Code(
            module
            for path, module in modules
            if module._modules and type(module) not in _WITHOUT_CODE and family_of(path) is not None
        )
        self._offload = _offload_state(model)
        own = self.targets.values()
        telling = list(_telling(own))
        self._telling = [(own.path, own.is_ours) for own in telling]
        self._watch = _core.Watch(
            [module._modules for _, module in modules if module._modules],
            [(own.parameters, own.name) for own in telling],
            [target.module._buffers for target in own],
        )
        self._layers = list({id(slot.module): (slot.path, slot.module) for slot in own}.values())
        self._values = _ComposedValues(self._layers)
        self.placed: PlacedStack | None = None
        self.kept = KeptSets()
        self._results: dict[Hashable, object] = {}

    @cached_property
    def order(self) -> Mapping[str, int]:
        """Each slot's place in the model."""
        return {path: place for place, path in enumerate(self.targets)}

    @cached_property
    def packed(self) -> Sequence[tuple[frozenset[str], Group]]:
        """Packed slots that leave their ranks together: their paths, and the slots."""
        alike: dict[Hashable, list[Target]] = defaultdict(list)
        for target in self.targets.values():
            row = target.row
            if target.place is not None:
                key = (row.pattern, row.offloaded, row.base_rank, target.dtype, target.device)
                alike[key].append(target)
        groups = [Group(tuple(own)) for own in alike.values()]
        return [(frozenset(t.path for t in group.targets), group) for group in groups]

    def ends(self) -> list[Tensor]:
        """The current `down` of the first packed slot and of the last one."""
        packed = [target for target in self.targets.values() if target.place is not None]
        return factors_of([*packed[:1], *packed[-1:]], LowRankSide.DOWN)

    @cached_property
    def slot_map(self) -> _core.SlotMap:
        """The slots as what plans are made for."""
        return slot_map(self.targets.values())

    @cached_property
    def block_count(self) -> int:
        """How many numbered blocks the model has."""
        return count_blocks(self.targets)

    @cached_property
    def offloaded(self) -> Mapping[str, Sequence[Target]]:
        """Slots of blocks that are offloaded, by what their paths have in common."""
        found: dict[str, list[Target]] = defaultdict(list)
        for target in self.targets.values():
            if target.row.offloaded:
                found[target.row.pattern].append(target)
        return found

    @cached_property
    def twins(self) -> Sequence[Target]:
        """Under offload, the slots of the buffer blocks."""
        layout = self.layout
        if layout is None:
            return []
        return [twin for own in self.offloaded.values() for twin in layout.twins(own[0])]

    @cached_property
    def accelerator(self) -> torch.device | None:
        """The device that the model computes on, where that is not the CPU."""
        for target in self.with_twins():
            if target.device.type != "cpu":
                return target.device
        return None

    @cached_property
    def bare_records(self) -> Mapping[str, SlotRecord]:
        """Records of every slot without deltas, by path."""
        ranks = {path: target.row.base_rank for path, target in self.targets.items()}
        records = {rank: SlotRecord(rank, 0) for rank in {*ranks.values()}}
        return {path: records[rank] for path, rank in ranks.items()}

    @cached_property
    def base_bytes(self) -> int:
        """Bytes of all base branches."""
        return sum(target.base_bytes for target in self.targets.values())

    def with_twins(self) -> list[Target]:
        """Every slot, those of the buffer blocks included."""
        return [*self.targets.values(), *self.twins]

    def look(self) -> None:
        """Remember the slots' current tensors as the ones that a composition left there."""
        self._watch.look()
        self._values = _ComposedValues(self._layers)

    def is_current(self, model: nn.Module) -> bool:
        """Tell if every module, and every tensor of every slot, is where it was.

        The tensors are not kept alive: whoever moves a model replaces its buffers. Compares tensor
        identities, data pointers and buffer counts. Who calls a layer, and in which order rows are
        taken, is in the code of the blocks: a forward or a processor that was put in the place of
        another counts as a change.
        """
        return (
            self._offload == _offload_state(model)
            and self._watch.is_unchanged()
            and self._code.is_unchanged()
        )

    def require_unwritten(self, state: AppliedState) -> None:
        """Check that nobody wrote over a composed model, as `load_state_dict` does.

        A factor, a bias or a norm that was composed and then written to holds values that are not
        known. One weight of many may be anybody's own; where most were written, another model was
        loaded over this one.

        Raises:
            ModelStateError: Somebody did.
        """
        if not state.records or state.in_flight:
            return
        written = [self._telling[at] for at in self._watch.rewritten()]
        factors = [path for path, is_ours in written if is_ours and path in state.records]
        values = self._values.rewritten()
        others = sum(not is_ours for _, is_ours in self._telling)
        if factors or values:
            require_not_overwritten(state, f"`{[*factors, *values][0]}` was")
        if 2 * sum(not is_ours for _, is_ours in written) > others:
            require_not_overwritten(state, "most of the model's weights were")

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make` for this key; the last few results are remembered."""
        if key in self._results:
            known = self._results[key] = self._results.pop(key)
            return known  # type: ignore[return-value]
        result = make()
        self._results[key] = result
        while len(self._results) > _MAX_REMEMBERED:
            del self._results[next(iter(self._results))]
        return result


_WITHOUT_CODE = (nn.ModuleList, nn.Sequential)
"""Containers whose own code tells nothing of who is called."""


class _Code:
    """What ran in the parts of a model's blocks: their classes, own forwards and processors."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._parts = [
            (module, own, plain_class(type(module)), own.get("forward"), own.get("processor"))
            for module, own in ((module, module.__dict__) for module in modules)
        ]
        kinds: set[Any] = {kind for _, _, kind, _, _ in self._parts}
        self._forwards = [(kind, kind.forward) for kind in kinds]

    def is_unchanged(self) -> bool:
        """Tell if the same runs now."""
        for module, own, kind, forward, processor in self._parts:
            if (
                plain_class(type(module)) is not kind
                or own.get("forward") is not forward
                or own.get("processor") is not processor
            ):
                return False
        return all(kind.forward is forward for kind, forward in self._forwards)


class _Telling(NamedTuple):
    """A parameter that tells whether a slot is as it was.

    Attributes:
        path: The slot's path.
        name: The parameter's name.
        parameters: All parameters of the module that holds it.
        is_ours: Whether composing changes it; else it tells where the slot is.
    """

    path: str
    name: str
    parameters: dict[str, nn.Parameter | None]
    is_ours: bool


def _telling(targets: Iterable[Target]) -> Iterator[_Telling]:
    for target in targets:
        parameters, place = target.owner._parameters, target.place
        names = [*parameters][:1] if place is None else [place.down, place.up]
        for name in names:
            if parameters.get(name) is not None:
                yield _Telling(target.path, name, parameters, place is not None)


class _ComposedValues:
    """The stored values that a composition changed: biases, norms' weights, embeddings' tables."""

    def __init__(self, layers: Iterable[tuple[str, nn.Module]]) -> None:
        """Each module once, with the path of a slot of it."""
        changed = [
            (path, module, name)
            for path, module in layers
            if BASE_VALUES in module.__dict__
            for name in module.__dict__[BASE_VALUES]
        ]
        self._names = [f"{path}.{name}" for path, _, name in changed]
        places = [
            (module._parameters if name in module._parameters else module._buffers, name)
            for _, module, name in changed
        ]
        self._watch = _core.Watch([], places, []) if places else None

    def rewritten(self) -> list[str]:
        """Those that were written to in place since."""
        return [] if self._watch is None else [self._names[at] for at in self._watch.rewritten()]


def _offload_state(model: nn.Module) -> tuple[object, ...]:
    manager = getattr(model, "offload_manager", None)
    switch = getattr(model, "offload", None)
    if manager is None:
        return (None, switch)
    blocks = tuple(getattr(manager, "buffer_blocks", ()))
    return (manager, switch, getattr(manager, "num_blocks_on_gpu", None), blocks)


_ATTRIBUTE = "_qwenlora_structure"


class _Remembered:
    """Holds a model's structure in the model itself, so that the collector sees their cycles.

    A layer may reach the model, as one whose forward is a closure over it does. A copy of the
    model and what is saved of it hold None instead.
    """

    __slots__ = ("structure",)

    def __init__(self, structure: Structure) -> None:
        self.structure = structure

    def __reduce__(self) -> tuple[object, ...]:
        return (type(None), ())


def _known(model: nn.Module) -> Structure | None:
    remembered = model.__dict__.get(_ATTRIBUTE)
    return remembered.structure if isinstance(remembered, _Remembered) else None


def _unwritten(model: nn.Module, state: AppliedState) -> Structure | None:
    """The remembered structure, or None; checks that nobody wrote over the composed model.

    Raises:
        ModelStateError: Somebody did.
    """
    require_not_overwritten(state)
    known = _known(model)
    if known is not None:
        known.require_unwritten(state)
    return known


def structure_of(model: nn.Module, state: AppliedState) -> Structure:
    """The transformer's slots, its lock held; found anew where anything has changed.

    Raises:
        UnsupportedModelError: The model has no slots.
        ModelStateError: Something else changed its slots.
    """
    known = _unwritten(model, state)
    if known is not None:
        if known.is_current(model):
            return known
        forget_structure(model)
    found = found_structure(model, state)
    model.__dict__[_ATTRIBUTE] = _Remembered(found)
    return found


def found_structure(model: nn.Module, state: AppliedState) -> Structure:
    """The transformer's slots, found anew and checked against what is recorded of them.

    Raises:
        UnsupportedModelError: The model has no slots.
        ModelStateError: Something else changed its slots.
    """
    _unwritten(model, state)
    found = Structure(model, state)
    if not state.in_flight:
        in_place = {
            path: slot_of(found.targets[path]).rank_added()
            for path in state.records
            if path in found.targets
        }
        check_intact(state, in_place)
        check_branches([found.targets[path] for path in in_place])
    return found


def remember_structure(model: nn.Module, structure: Structure) -> None:
    """The slots are as a composition left them."""
    structure.look()
    model.__dict__[_ATTRIBUTE] = _Remembered(structure)


def forget_structure(model: nn.Module) -> None:
    """Find the slots anew the next time: they may be in any state."""
    model.__dict__.pop(_ATTRIBUTE, None)


def check_branches(targets: Iterable[Target]) -> None:
    """Check that no part of a side branch was taken away, and that all of it runs.

    Raises:
        ModelStateError: A layer's branch lacks a part, or the kernel around it passes over it.
    """
    for target in targets:
        runs = target.opened is None or is_as_needed(target.opened)
        if not (runs and is_whole(target.module)):
            raise ModelStateError(
                f"`{target.path}` lacks a part of the branch that was left beside it:"
                " something else changed the model\nhint: reload the model"
            )


def composed_bytes(model: nn.Module) -> int:
    """Bytes of the ranks that LoRAs added to packed branches, the model's lock held.

    They are parameters, so a host that measures the model counts them. Side branches are buffers.

    Raises:
        UnsupportedModelError: The model has no slots.
        ModelStateError: Something else changed its slots.
    """
    state = read_state(model)
    targets = structure_of(model, state).targets if state.records else {}
    packed = [targets[path] for path in state.records if targets[path].place is not None]
    downs = factors_of(packed, LowRankSide.DOWN)
    return sum(
        target.rank_bytes * (down.shape[1] - target.row.base_rank)
        for target, down in zip(packed, downs, strict=True)
    )
