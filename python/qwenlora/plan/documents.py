"""The two documents as Python sees them: FilePlan (JSON of one file) and StackPlan.

Rust plans; what arrives here is checked, plain data.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

from qwenlora import _core
from qwenlora.packing.layout import RowOrder

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any, TypeAlias

    from qwenlora.spec import ComposeOptions

__all__ = [
    "AlikeMember",
    "AlikeSlots",
    "BlockBuild",
    "Cayley",
    "Piece",
    "PieceKind",
    "RankGroup",
    "RotationRule",
    "Route",
    "Side",
    "Skip",
    "SlotKind",
    "SlotPlan",
    "SlotRow",
    "StackItem",
    "StackPlan",
    "TensorRef",
    "plan_stack",
    "read_keys",
    "read_producer",
    "slot_map",
]


class SlotRow(NamedTuple):
    """A slot's facts for planning; plain data, which Rust takes by these names.

    `opens` says that what runs the layer inside a kernel can be run with the layer by itself.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    base_rank: int
    element_bytes: int
    offloaded: bool
    pattern: str
    has_bias: bool
    build: str
    opens: bool = False


class SlotKind(enum.Enum):
    """The kind of layer that a slot is."""

    SVDQ = "svdq"
    AWQ = "awq"
    LINEAR = "linear"
    NORM = "norm"
    EMBEDDING = "embedding"


class BlockBuild(enum.Enum):
    """The build of the block that a slot is in: what a layer's own tensors do not tell."""

    NUNCHAKU = "nunchaku"
    """Projections are fused, an MLP runs in one kernel, modulations have interleaved rows."""
    STOCK = "stock"
    """diffusers' own block: every linear is a module that is called, all rows are planar."""


class Side(enum.Enum):
    """The side of a weight (out, in) that a diagonal or a rotation is multiplied to."""

    OUT = "out"
    IN = "in"


class Route(enum.Enum):
    """The way in which a slot carries its low-rank deltas."""

    INSIDE = "inside"
    """Behind the base branch of a packed layer; beside a layer that has none."""
    BESIDE = "beside"
    """Beside the layer, whose own output is then the base's alone."""


class Cayley(enum.Enum):
    """The way from a skew-symmetric block Q to a rotation."""

    EXACT = "exact"
    """(I + Q)(I - Q)^-1: LyCORIS."""
    NEUMANN = "neumann"
    """I + 2Q + 2Q^2 + 2Q^3 + Q^4: PEFT's default, and OneTrainer."""
    SOLVE = "solve"
    """(I - Q)(I + Q)^-1: PEFT with `use_cayley_neumann=False`."""


class PieceKind(enum.Enum):
    """The form in which a delta is executed."""

    LOW_RANK = "LowRank"
    KRON = "Kron"
    DENSE = "Dense"
    VECTOR = "Vector"
    DIAGONAL = "Diagonal"
    ROTATION = "Rotation"


@dataclass(frozen=True)
class TensorRef:
    """A tensor of a file: its key, its number, safetensors dtype, shape and place in bytes.

    `first_row` is the first of its rows where it is some of them alone: shape and place are theirs.
    """

    key: str
    index: int
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    len_bytes: int
    first_row: int | None = None


@dataclass(frozen=True)
class RotationRule:
    """The way from stored blocks to rotations.

    Attributes:
        cayley: From a skew-symmetric block to a rotation.
        constraint: LyCORIS' alpha as it is stored: times the rows, the most that the norm of all
            blocks may be; 0 where there is none.
        scaled: Whether Q is divided by 2 sqrt(b - 1), as OneTrainer's marker says.
        shared: Whether one block stands for all.
    """

    cayley: Cayley
    constraint: float = 0.0
    scaled: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Piece:
    """One delta that a slot carries.

    `scale` is the factor on the raw product without the strength; rows `row_begin` to
    `row_begin + row_count` of the slot's logical output change. `rank_bound` is the rank of the
    exact pair that the stored delta equals, or the most that its shape allows; `rank_budget` the
    rank that a delta of higher rank is cut to. `parameter` names the tensor that a vector is added
    to. `side` is a diagonal's or a rotation's, `rotation` how its blocks become rotations;
    `scales_bias` says that a diagonal of rows applies to the layer's bias, too. `exactness` is
    "exact", "norms" (the norms of the 16-bit weight are estimated) or "truncated".
    """

    kind: PieceKind
    adapter: str
    lora: int
    target: str
    rank: int
    rank_bound: int
    rank_budget: int | None
    scale: float
    row_begin: int
    row_count: int
    parameter: str | None
    tensors: Mapping[str, TensorRef]
    side: Side | None = None
    rotation: RotationRule | None = None
    scales_bias: bool = False
    exactness: str = "exact"


@dataclass(frozen=True)
class SlotPlan:
    """One slot's pieces; `rank` bounds the ranks added, `rank_limit` is the most allowed.

    `route` is the way in which it carries ranks, `branch_bytes` bounds what its pieces that are no
    rank take.
    """

    path: str
    kind: SlotKind
    row_order: RowOrder
    route: Route
    base_rank: int
    rank: int
    rank_limit: int | None
    branch_bytes: int
    group: int | None
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class RankGroup:
    """Slots whose rank must be the same, because offload copies them through one buffer."""

    pattern: str
    slots: tuple[str, ...]
    rank: int


@dataclass(frozen=True)
class Skip:
    """A module, or a tensor, that is left out.

    `matters` where the delta lacks it; `harmless` where nothing that was trained is lost with it,
    of another component either.
    """

    lora: int
    name: str
    kind: str
    reason: str
    piece: str | None
    matters: bool
    harmless: bool = False


AlikeTensor: TypeAlias = "tuple[int, Sequence[int], Sequence[int]]"
"""The same tensor of a module in every slot of a group: the bytes of each, where each begins in the
file, and which tensor of the file each is."""
AlikeMember: TypeAlias = "tuple[int, float, int, int, str, AlikeTensor, AlikeTensor]"
"""A module of one LoRA in every slot of a group: rank, scale, first row, rows, dtype, `down` and
`up`."""


class AlikeSlots(NamedTuple):
    """Slots of one path that get deltas of the same shapes and scales.

    Attributes:
        slots: Indices of the targets.
        row_order: Order of their output rows.
        stacks: In the order of the stack, each LoRA's index and its modules by rows.
    """

    slots: Sequence[int]
    row_order: str
    stacks: Sequence[tuple[int, Sequence[AlikeMember]]]


class StackPlan:
    """The plan of a stack on the model at hand.

    Slots that are alike are described together; a single slot's plan is made when it is asked for.

    Attributes:
        alike: Groups of slots.
        single: Plans of the slots that are in no group, by index of the target.
        applied_modules: Modules applied, LoRA by LoRA.
        added_bytes: Upper bound of the bytes that the stack adds to the model.
    """

    def __init__(self, core: _core.PlannedStack) -> None:
        self._core = core
        rows, single = core.grouped()
        self.alike = tuple(AlikeSlots(*row) for row in rows)
        self.single = {
            index: _slot_plan(row) for index, row in (json.loads(single) if single else ())
        }
        self.applied_modules = tuple(core.applied_modules)
        self.added_bytes = core.added_bytes

    @cached_property
    def slots(self) -> tuple[SlotPlan, ...]:
        """Every slot that changes, in model order."""
        return tuple(_slot_plan(row) for row in self._document["slots"])

    def some(self, paths: Iterable[str]) -> dict[str, SlotPlan]:
        """The plans of some slots by path; those that have one."""
        rows = json.loads(self._core.slots_json(set(paths)))
        return {row["path"]: _slot_plan(row) for row in rows}

    @cached_property
    def groups(self) -> tuple[RankGroup, ...]:
        """Slots whose rank must be the same."""
        return tuple(
            RankGroup(row["pattern"], tuple(row["slots"]), row["rank"])
            for row in self._document["groups"]
        )

    @cached_property
    def skipped(self) -> tuple[Skip, ...]:
        """Pieces and modules that are left out, with the reasons."""
        return tuple(Skip(**row) for row in json.loads(self._core.skipped_json()))

    @cached_property
    def _document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self._core.to_json())
        return document


def _slot_plan(row: dict[str, Any]) -> SlotPlan:
    pieces = tuple(_piece(piece) for piece in row.pop("pieces"))
    kind, row_order = SlotKind(row.pop("kind")), RowOrder(row.pop("row_order"))
    route = Route(row.pop("route"))
    return SlotPlan(kind=kind, row_order=row_order, route=route, pieces=pieces, **row)


def _piece(row: dict[str, Any]) -> Piece:
    tensors = {
        role: TensorRef(**{**ref, "shape": tuple(ref["shape"])})
        for role, ref in row.pop("tensors").items()
    }
    kind, side, rotation = PieceKind(row.pop("kind")), row.pop("side"), row.pop("rotation")
    return Piece(
        kind=kind,
        tensors=tensors,
        side=None if side is None else Side(side),
        rotation=None if rotation is None else _rotation_rule(rotation),
        **row,
    )


def _rotation_rule(row: dict[str, Any]) -> RotationRule:
    return RotationRule(cayley=Cayley(row.pop("cayley")), **row)


class StackItem(NamedTuple):
    """A LoRA to be planned.

    Attributes:
        name: Its name in reports.
        plan: Its file's plan.
        strength: Its strength.
        modulation: Whether its part in the modulation layers is applied.
        off: The slots that get nothing of it, by their places in the map, ascending.
    """

    name: str
    plan: _core.FilePlan
    strength: float
    modulation: bool
    off: Sequence[int]


class HasRow(Protocol):
    """A slot of a model, at hand or known."""

    @property
    def row(self) -> SlotRow:
        """Its facts for planning."""


def slot_map(targets: Iterable[HasRow]) -> _core.SlotMap:
    """A model's slots as what plans are made for."""
    return _core.SlotMap([target.row for target in targets])


def plan_stack(
    items: Sequence[StackItem],
    slots: _core.SlotMap,
    *,
    max_rank: int | None,
    strict: bool,
    options: ComposeOptions,
) -> StackPlan:
    """Plan LoRAs onto a model's slots, given by `slot_map`.

    Raises:
        OtherModelError: A LoRA is another model's.
        NothingToApplyError: Nothing of a LoRA can be applied.
        UnsupportedAdapterError: With `strict`, a kind or a tensor that is not supported.
        BrokenPairError: With `strict`, incomplete tensors.
        ShapeMismatchError: With `strict`, a delta that does not fit.
        RankError: The limit leaves nothing, or a slot is full.
    """
    wanted = {
        "max_rank": max_rank,
        "strict": strict,
        "truncated_rank": options.truncated_rank,
        "lokr_scale": options.lokr_scale.value,
        "mlp": options.mlp,
        "dense_budget": options.dense_budget,
    }
    return StackPlan(_core.plan_stack(list(items), slots, json.dumps(wanted)))


def read_keys(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one LoRA file's keys and say what would be applied; no torch, no GPU.

    Args:
        path: A safetensors file or a PEFT folder.

    Returns:
        The FilePlan document, schema 1, as `qwenlora-keys --json` prints it. Its `model` is the
        name of the model that the file is for.

    Raises:
        LoraReadError: The file cannot be read.
        LoraFileError: It is not a well-formed safetensors file.
    """
    document: dict[str, Any] = json.loads(_core.FilePlan.read(path).to_json())
    return document


def read_producer(path: str | os.PathLike[str]) -> str:
    """Say which program wrote a LoRA file, and how that is known, as `qwenlora-keys` does.

    Raises:
        LoraReadError: The file cannot be read.
        LoraFileError: It is not a well-formed safetensors file.
    """
    return _core.FilePlan.read(path).producer
