"""One seed: a random model, some files, and a history of operations, each checked."""

from __future__ import annotations

import copy
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import qwenlora
from qwenlora import ComposeOptions, LoraSpec, Placement, QwenLoraError
from qwenlora.errors import NothingToApplyError

from . import models
from .checks import Checker, Fault, require
from .loras import Lora, random_lora
from .oracle import is_modulation
from .wanted import Factors, Wanted

if TYPE_CHECKING:
    from qwenlora import ComposeReport

FILES = 4
OPERATIONS = 14
STRENGTHS = [1.0, 1.0, 0.5, -0.7, 0.3, 2.5, -1.0, 0.0]
FACTORS = [1.0, 0.5, -2.0, 0.3, 0.0]
KINDS = ["attn", "mlp", "mod", "img", "txt", "rest"]
Row = tuple[int, Factors]
"""A file of the case by its number, and how much of it is wanted."""


class Stopped(Exception):
    """Raised by a progress callback."""


class Case:
    """Lives through one seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self._draw = random.Random(seed)
        self._base = models.random_model(self._draw)
        self._model = copy.deepcopy(self._base)
        self._layers = models.layers_of(self._base)
        self._files: list[Lora] = [
            random_lora(self._draw, self._layers, folder / f"{number}.safetensors")
            for number in range(FILES)
        ]
        self._stack: list[Row] = []
        self._settings: dict[str, object] = {}
        self._sets: list[tuple[list[Row], dict[str, object]]] = []
        self.history: list[str] = [self._described()]
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """All operations; the last is a reset, which must leave the bits of the base."""
        operations = [
            *[self._compose] * 5,
            *[self._rescale] * 3,
            *[self._return] * 2,
            self._reset,
            self._copy,
            self._forget,
            *[self._fail] * 2,
        ]
        for _ in range(OPERATIONS):
            self._draw.choice(operations)()
            self.counts["operations"] += 1
        self._reset()

    def _described(self) -> str:
        config = self._base.config
        return (
            f"{config.num_layers} blocks of {config.channels}, rank {config.rank},"
            f" {config.precision.value}, {config.dtype}, offload {self._base.offload}"
        )

    # ---- operations ----

    def _compose(self) -> None:
        self._to(self._some_stack(), self._some_settings())

    def _rescale(self) -> None:
        stack = [(index, self._some_factors()) for index, _ in self._stack]
        self._to(stack, self._settings)

    def _return(self) -> None:
        """Back to a set that was left."""
        if self._sets:
            self._to(*self._draw.choice(self._sets))

    def _reset(self) -> None:
        self.history.append("reset")
        qwenlora.reset_loras(self._model)
        self._stack, self._settings = [], {}
        self._require_base()

    def _copy(self) -> None:
        """Go on with a deep copy; the original resets alone."""
        self.history.append("deep copy")
        left, self._model = self._model, copy.deepcopy(self._model)
        qwenlora.reset_loras(left)
        self._check(qwenlora.applied(self._model))

    def _forget(self) -> None:
        self.history.append("clear the cache")
        qwenlora.clear_cache()

    def _fail(self) -> None:
        """Stopped somewhere: the old stack, or by path the base."""
        before, failure = _bits(self._model), qwenlora.applied(self._model).failure
        stack, settings = self._some_stack(), {**self._some_settings(), "strict": False}
        left = self._draw.randrange(30)

        def progress(*_: object) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stopped

        self.history.append(f"stopped after {left}: {stack} {settings}")
        try:
            self._call(self._model, stack, settings, progress=progress)
        except Stopped:
            now = qwenlora.applied(self._model).failure
            if now is not None and now is not failure:
                require(settings["placement"] is Placement.BY_PATH, "the old stack was lost")
                self._require_base()
                self._stack, self._settings = [], {}
            else:
                require(_bits(self._model) == before, "a stopped composition left traces")
            return
        except NothingToApplyError:
            self._check_nothing(stack, settings, before)
            return
        self._held(stack, settings)

    # ---- what they share ----

    def _some_stack(self) -> list[Row]:
        count = self._draw.choice([1, 1, 2, 2, 3, 4])
        return [(self._draw.randrange(FILES), self._some_factors()) for _ in range(count)]

    def _some_factors(self) -> Factors:
        """A strength, mostly without factors by block."""
        draw, strength = self._draw, self._draw.choice(STRENGTHS)
        if draw.random() < 0.6:
            return Factors(strength)
        blocks = draw.sample(range(self._base.config.num_layers), draw.choice([0, 1]))
        kinds = draw.sample(KINDS, draw.choice([0, 1, 1, 2]))
        return Factors(
            strength,
            {block: draw.choice(FACTORS) for block in blocks},
            {kind: draw.choice(FACTORS) for kind in kinds},
        )

    def _some_settings(self) -> dict[str, object]:
        draw = self._draw
        return {
            "max_rank": draw.choice([None, None, None, "auto", 3, 16, 40, 100]),
            "strict": draw.random() < 0.1,
            "placement": draw.choice(list(Placement)),
            "truncated_rank": draw.choice([256, 256, 16, 48]),
            "max_energy_lost": draw.choice([0.1, 0.1, 1.0]),
            "dense_budget": draw.choice([0, 0, 1 << 30]),
            "mlp": draw.choice(["exact", "exact", "rank"]),
            "modulation": draw.random() < 0.8,
            "cache_bytes": draw.choice([0, 100_000, 1 << 30]),
            "threads": draw.choice([None, 1, 3]),
            "staging_bytes": draw.choice([1 << 27, 1 << 20]),
        }

    def _call(
        self, model: torch.nn.Module, stack, settings: dict[str, object], *, progress=None
    ) -> ComposeReport:
        options = {k: v for k, v in settings.items() if k not in ("max_rank", "strict")}
        specs = [
            LoraSpec(self._files[index].path, own.strength, name=f"file {index}", blocks=own.text)
            for index, own in stack
        ]
        return qwenlora.compose_loras(
            model,
            specs,
            max_rank=settings["max_rank"],
            strict=bool(settings["strict"]),
            options=ComposeOptions(progress=progress, **options),
        )

    def _to(self, stack: list[Row], settings: dict[str, object]) -> None:
        if not settings:
            settings = self._some_settings()
        self.history.append(f"{stack} {settings}")
        before = _bits(self._model)
        try:
            report = self._call(self._model, stack, settings)
        except NothingToApplyError:
            self._check_nothing(stack, settings, before)
            return
        except QwenLoraError as error:
            require(bool(settings["strict"]), f"{type(error).__name__}: {error}")
            self._check_strict(stack, settings, before)
            return
        if settings["strict"]:
            require(report.complete, "strict, and something is left out")
        self._held(stack, settings)
        if self._draw.random() < 0.15:
            self._check_fresh(stack, settings)

    def _held(self, stack: list[Row], settings: dict[str, object]) -> None:
        self._stack, self._settings = stack, settings
        self._sets.append((stack, settings))
        self._check(qwenlora.applied(self._model))

    def _check(self, report: ComposeReport) -> None:
        require(report.failure is None or not self._stack, f"failed: {report.failure}")
        stack = [(self._files[index], own) for index, own in self._stack if own.strength]
        require(len(report.loras) == len(stack), "a LoRA is missing in the report")
        refused = [
            {skip.name for skip in lora.skipped if skip.kind == "energy"} for lora in report.loras
        ]
        modulation = bool(self._settings.get("modulation", True))
        wanted = Wanted(self._base, stack, modulation=modulation, refused=refused)
        for (lora, factors), own, names in zip(stack, report.loras, refused, strict=True):
            self._check_left_out(lora, factors, own.skipped, names)
        checker = Checker(self._model, self._base, wanted, report)
        checker.run(self._settings.get("max_rank") if stack else None)
        self.counts["compositions"] += 1
        self.counts["slots"] += checker.slots
        self.counts["slots cut"] += sum(slot.energy_lost is not None for slot in report.slots)
        self.counts["slots with products"] += sum(slot.krons > 0 for slot in report.slots)
        self.counts["slots bounded"] += sum(slot.energy_is_bound for slot in report.slots)

    def _check_left_out(self, lora: Lora, factors: Factors, skipped, refused: set[str]) -> None:
        names = {skip.name for skip in skipped if skip.matters}
        missing = {name for name in lora.left_out if not any(name in own for own in names)}
        if not self._settings.get("modulation", True):
            missing = {name for name in missing if not is_modulation(name)}
            names = {name for name in names if not any(map(is_modulation, _stems(name)))}
        missing = {name for name in missing if not factors.is_off(self._layer_of(name))}
        names = {name for name in names if not factors.is_off(self._layer_of(name))}
        require(not missing, f"left out without a word: {missing}")
        known = lora.left_out | refused
        extra = {name for name in names if not any(own in name for own in known)}
        require(not extra, f"left out, and should not be: {extra}")
        self._check_refusals(lora, factors, refused)

    def _layer_of(self, name: str) -> str:
        """The path of the layer that a module's name, or a tensor's key, is of."""
        flat = name.replace(".", "_")
        named = (layer for layer in self._layers if layer.name.replace(".", "_") in flat)
        found = max(named, key=lambda layer: len(layer.name), default=None)
        return name if found is None else found.slot

    def _check_refusals(self, lora: Lora, factors: Factors, refused: set[str]) -> None:
        """A full delta is refused where, and only where, its best form loses too much."""
        limit = float(self._settings["max_energy_lost"])
        for piece in lora.pieces:
            path = piece.layer.slot
            if not piece.full or not models.is_quantized(self._base, path):
                continue
            if is_modulation(path) and not self._settings["modulation"]:
                continue
            if factors.is_off(path):
                continue
            is_fused = "_mlp." in path and self._settings["mlp"] == "rank"
            if self._settings["dense_budget"] and not is_fused:
                name = piece.layer.name
                require(name not in refused, f"{name}: refused, though it may run whole")
                continue
            rank = self._settings["max_rank"]
            room = models.MOST_RANK - models.base_rank(self._base, path)
            budget = min(
                int(self._settings["truncated_rank"]),
                room if models.base_rank(self._base, path) else models.MOST_RANK,
                rank if isinstance(rank, int) else models.MOST_RANK,
            )
            energies = torch.linalg.svdvals(piece.delta).square()
            lost = float(energies[budget:].sum() / energies.sum()) if energies.sum() else 0.0
            said = piece.layer.name in refused
            if abs(lost - limit) > 1e-4:
                require(said == (lost > limit), f"{piece.layer.name}: refused {said}, loses {lost}")

    def _check_nothing(self, stack, settings, before: dict[str, bytes]) -> None:
        """Nothing of some LoRA can be applied, and the model is as it was."""
        self._require_old(settings, before)
        empty = False
        for index, own in stack:
            pieces = [p for p in self._files[index].pieces if not own.is_off(p.layer.slot)]
            if not settings["modulation"]:
                pieces = [piece for piece in pieces if not is_modulation(piece.layer.slot)]
            # Full deltas may all lose too much.
            empty |= bool(own.strength) and all(piece.full for piece in pieces)
        require(empty, "refused, though something could be applied")

    def _check_strict(self, stack, settings, before: dict[str, bytes]) -> None:
        self._require_old(settings, before)
        reason = any(
            own.strength
            and (self._files[index].left_out or any(p.full for p in self._files[index].pieces))
            for index, own in stack
        )
        require(reason, "strict, refused, and nothing had to be left out")

    def _check_fresh(self, stack, settings) -> None:
        """A model never touched before comes to the same bits."""
        fresh = copy.deepcopy(self._base)
        qwenlora.clear_cache()
        self._call(fresh, stack, settings)
        mine, its = _bits(self._model), _bits(fresh)
        differing = [name for name in {**mine, **its} if mine.get(name) != its.get(name)]
        require(not differing, f"history left traces in {differing[:5]}")
        self.counts["compared bit by bit"] += 1

    def _require_old(self, settings, before: dict[str, bytes]) -> None:
        """After a refusal: what was there, or by path the base."""
        if _bits(self._model) != before:
            require(settings["placement"] is Placement.BY_PATH, "refused, and changed")
            self._require_base()
            self._stack, self._settings = [], {}

    def _require_base(self) -> None:
        mine, its = _bits(self._model), _bits(self._base)
        differing = [name for name in {**mine, **its} if mine.get(name) != its.get(name)]
        require(not differing, f"not the base: {differing[:5]}")


def _stems(name: str) -> list[str]:
    """A tensor's key, and what may be a module's name in it."""
    stem = name.replace("_mod_1", "_mod.1")
    return [stem[: at + len("_mod.1")] for at in range(len(stem)) if stem.startswith("_mod.1", at)]


def _bits(model: torch.nn.Module) -> dict[str, bytes]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }


def run_case(seed: int) -> Counter[str]:
    """Run one seed; what was done.

    Raises:
        Fault: Something is not true, or an operation fails; the message has the seed and what was
            done.
    """
    with tempfile.TemporaryDirectory() as folder:
        case = Case(seed, Path(folder))
        try:
            case.run()
        except Exception as error:
            done = "\n  ".join(case.history)
            raise Fault(f"seed {seed}: {done}\n{type(error).__name__}: {error}") from error
        finally:
            qwenlora.clear_cache()
    return case.counts
