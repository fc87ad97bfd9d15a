"""A stack with its settings, as a value: what is wanted, apart from how it is applied."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlora import cache
from qwenlora.errors import QwenLoraError, RankError
from qwenlora.names import names_of
from qwenlora.source.norms_file import NormsFile
from qwenlora.source.open import known_source, open_source
from qwenlora.spec import ComposeOptions, LoraSpec, as_specs
from qwenlora.work.jobs import Job, Jobs

if TYPE_CHECKING:
    from qwenlora.source.source import LoraSource
    from qwenlora.spec import Item, MaxRank, PathLike

__all__ = ["NO_LORAS", "LoraSet", "Unmakeable"]


_READERS = 8
"""Most files that are planned at a time."""
_LAST = "_at_last"
"""Attribute of a set: the factors that it was last asked for, and what they gave."""


@dataclass(frozen=True, eq=False)
class LoraSet:
    """An immutable stack: LoRAs with strengths, planned, and the settings that steer the result.

    The identity of each file is taken when the set is made and never again; a set that is asked for
    after its file changed is refused when the file is read.

    Attributes:
        specs: The LoRAs, in order; none has strength 0 throughout.
        sources: Their plans and files, in the same order.
        max_rank: Most ranks that the LoRAs may add to a slot, or "auto".
        options: How to compose.
        norms: The file of `ComposeOptions.norms`, opened; None where there is none.
        key: Equal exactly for sets that lead to the same tensors and report.
    """

    specs: tuple[LoraSpec, ...]
    sources: tuple[LoraSource, ...]
    max_rank: MaxRank
    options: ComposeOptions
    norms: NormsFile | None = None
    key: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        loras = tuple(
            (
                (source.identity, spec.title, spec.modulation, spec.blocks),
                spec.strength,
                spec.schedule,
            )
            for source, spec in zip(self.sources, self.specs, strict=True)
        )
        options = self.options
        settings = (
            options.modulation,
            options.truncated_rank,
            options.max_energy_lost,
            options.lokr_scale,
            options.mlp,
            options.dense_budget,
            None if self.norms is None else self.norms.identity,
        )
        key = (loras, self.max_rank, settings) if loras else ()
        object.__setattr__(self, "key", key)

    @classmethod
    def of(
        cls,
        loras: Item | Sequence[Item] = (),
        *,
        max_rank: MaxRank = None,
        options: ComposeOptions | None = None,
    ) -> LoraSet:
        """Plan a stack; see `compose_loras` for its forms.

        Raises:
            LoraReadError: A file cannot be read.
            LoraFileError: A file is malformed.
            RankError: `max_rank` leaves nothing.
            NormsFileError: `ComposeOptions.norms` is no file of norms.
            OtherModelError: Its norms are of another model than a LoRA.
            TypeError: An item, or `max_rank`, is of no accepted form.
        """
        _check_max_rank(max_rank)
        options = options or ComposeOptions()
        specs = as_specs(loras)
        sources = _opened(specs, options)
        norms = None if options.norms is None else _norms(options.norms, sources)
        return cls(specs, sources, max_rank, options, norms)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The LoRAs' names in reports and errors, in the same order; no two alike."""
        return names_of(self.specs)

    def extended(self, loras: Item | Sequence[Item]) -> LoraSet:
        """The set with more LoRAs at its end; this one is unchanged."""
        more = LoraSet.of(loras, max_rank=self.max_rank, options=self.options)
        return replace(self, specs=self.specs + more.specs, sources=self.sources + more.sources)

    @cached_property
    def has_schedule(self) -> bool:
        """True where strengths change over the course of sampling."""
        return any(spec.schedule is not None for spec in self.specs)

    def at(self, share: float) -> LoraSet:
        """The set at a share of the course of sampling; what has no schedule is itself.

        The same factors give the same object, as long as no others were asked for.

        Raises:
            ValueError: The share is not a number, or a strength would not be finite.
        """
        if not self.has_schedule:
            return self
        factors = tuple(spec.course.factor(share) for spec in self.specs)
        last: tuple[tuple[float, ...], LoraSet] | None = self.__dict__.get(_LAST)
        if last is None or last[0] != factors:
            last = (factors, self._of_specs([spec.at(share) for spec in self.specs]))
            self.__dict__[_LAST] = last
        return last[1]

    def passes(self, key: Hashable) -> bool:
        """Tell if a key may be that of this set at a share of the course, whatever the strengths.

        That is so where it is of these LoRAs, some of them left out, and of the same settings.
        """
        if key in ((), self.key):
            return True
        if not (self.has_schedule and isinstance(key, tuple)) or key[1:] != self.key[1:]:
            return False
        rest = iter(self.key[0])
        return all(any(own == lasting for own, *_ in rest) for lasting, *_ in key[0])

    def scaled(self, factor: float) -> LoraSet:
        """The set with every strength times a factor; none is left where that is 0.

        Raises:
            ValueError: A strength would not be finite.
        """
        if factor == 1:
            return self
        return self._of_specs(
            [replace(spec, strength=spec.strength * factor) for spec in self.specs]
        )

    def _of_specs(self, changed: Sequence[LoraSpec]) -> LoraSet:
        """The set with other strengths; LoRAs that are absent are left out."""
        kept = [pair for pair in zip(changed, self.sources, strict=True) if not pair[0].is_absent]
        specs, sources = tuple(spec for spec, _ in kept), tuple(source for _, source in kept)
        return replace(self, specs=specs, sources=sources)

    def read_ahead(self, *, limit_bytes: int, first: int = 0) -> None:
        """Begin to bring files into the system's memory, in the background; composing ends it.

        Files of which at least half is kept as deltas are left out.

        Args:
            limit_bytes: Most bytes to read; files that exceed it are left out.
            first: The first LoRA whose file is read.
        """
        for source in self.sources[first:]:
            kept = 2 * cache.kept_bytes(source.identity) >= source.nbytes
            if source.nbytes <= limit_bytes and not kept:
                limit_bytes -= source.nbytes
                source.read_ahead()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoraSet) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoraSet:
        # Immutable throughout: hosts copy the options that it travels in.
        return self

    def __copy__(self) -> LoraSet:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        options = replace(self.options, progress=None)
        return (_planned_again, (self.specs, self.max_rank, options, self.key))


@dataclass(frozen=True)
class Unmakeable:
    """A set whose tensors or files are not at hand: it can stay where it is, but not come back.

    Attributes:
        key: Key of the set.
    """

    key: Hashable


def _planned_again(
    specs: tuple[LoraSpec, ...], max_rank: MaxRank, options: ComposeOptions, key: Hashable
) -> LoraSet | Unmakeable:
    """A set that was pickled, planned anew from the current files."""
    try:
        return LoraSet.of(specs, max_rank=max_rank, options=options)
    except QwenLoraError:
        # What was composed from them may still be in the model that is being loaded.
        return Unmakeable(key)


def _norms(path: PathLike, sources: Sequence[LoraSource]) -> NormsFile:
    """Open a file of norms, which must be of the LoRAs' model."""
    norms = NormsFile.open(path)
    for source in sources:
        model = json.loads(source.plan.to_json())["model"]
        if model is not None:
            norms.require_model(model)
    return norms


def _opened(specs: Sequence[LoraSpec], options: ComposeOptions) -> tuple[LoraSource, ...]:
    """Plan every LoRA, files side by side; what fails first in the stack's order is raised."""

    def opened(spec: LoraSpec) -> LoraSource:
        return open_source(spec, cache.plans, threads=options.threads)

    files = {path: spec for spec in specs if (path := _path_of(spec)) is not None}
    if len(files) < 2:
        return tuple(map(opened, specs))
    known: dict[Path | None, LoraSource] = {
        path: source
        for path, spec in files.items()
        if (source := known_source(spec, cache.plans, threads=options.threads)) is not None
    }

    def source_of(spec: LoraSpec) -> LoraSource:
        path = _path_of(spec)
        if path in opening:
            return opening[path].result()
        return known[path] if path in known else opened(spec)

    opening: dict[Path | None, Job[LoraSource]] = {}
    unread = [path for path in files if path not in known]
    # A thread is worth its start only where another file is read meanwhile.
    if len(unread) < 2:
        return tuple(map(source_of, specs))
    jobs = Jobs(min(len(unread), _READERS))
    try:
        opening.update((path, jobs.submit(partial(opened, files[path]))) for path in unread)
        # State dicts stay on this thread.
        return tuple(map(source_of, specs))
    finally:
        jobs.close()


def _path_of(spec: LoraSpec) -> Path | None:
    return None if isinstance(spec.source, Mapping) else Path(spec.source)


def _check_max_rank(max_rank: object) -> None:
    if max_rank is None or (isinstance(max_rank, str) and max_rank == "auto"):
        return
    if isinstance(max_rank, bool) or not isinstance(max_rank, int):
        raise TypeError(f'max_rank is {max_rank!r}: it is a whole number, "auto" or None')
    if max_rank < 1:
        raise RankError(f"max_rank is {max_rank}: it must be at least 1")


NO_LORAS = LoraSet.of()
"""The empty set, which every forward without a set wants: the bare base."""
