"""What must be true of a composed model and of its report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from qwenlora.emulation import Precision

from . import models, oracle
from .wanted import Slot, Wanted

if TYPE_CHECKING:
    from qwenlora import ComposeReport
    from qwenlora.report import SlotReport

ROUNDINGS = 4
"""Roundings to the slot's dtype that a value may see, with what they add up to over the ranks."""
SUBNORMAL = {torch.float16: 2.0**-24, torch.bfloat16: 0.0, torch.float32: 0.0}
"""Smallest step of a dtype, where trained values come near it."""
FLOAT32 = 2e-6
"""Rounding of sums and products in float32."""
CALLED = 1e-5
"""Of a float32 layer's output and its change, what the change may be off."""
FUSED_MLP = ("mlp.net.0.proj", "mlp.net.2")
"""Layers that run inside one kernel, and are never called alone."""
ENERGY = 3e-5
"""Of a slot's energy, what a stated one may be off: orthogonal iteration, float32."""


class Fault(AssertionError):
    """Something that is not true."""


def require(truth: bool, what: str) -> None:
    """Fail with what is not true."""
    if not truth:
        raise Fault(what)


class Checker:
    """Compares a composed model with what was wanted and with its untouched twin."""

    def __init__(
        self,
        model: torch.nn.Module,
        base: torch.nn.Module,
        wanted: Wanted,
        report: ComposeReport,
    ) -> None:
        self._model = model
        self._base = base
        self._wanted = wanted
        self._report = report
        self._reported = {slot.path: slot for slot in report.slots}
        self.slots = 0
        config = base.config
        self._is_exact = config.dtype is torch.float32 and config.precision is Precision.EXACT
        self._energy = self._lost = 0.0
        self._rounding = 0.0

    def run(self, max_rank: int | str | None) -> None:
        """Check every slot, then what the report says of all."""
        for path in models.slots_of(self._model):
            self._slot(path, max_rank)
        self._values()
        self._whole()
        self._loras()

    def _slot(self, path: str, max_rank: int | str | None) -> None:
        self.slots += 1
        wanted = self._wanted.slots.get(path, Slot())
        report = self._reported.get(path)
        module = self._model.get_submodule(path)
        kept = oracle.kept(self._model, path, models.base_rank(self._base, path))
        whole = torch.zeros_like(kept) if wanted.delta is None else wanted.delta
        eps = ROUNDINGS * torch.finfo(_dtype(module)).eps + FLOAT32
        rounding = eps * wanted.size + SUBNORMAL[_dtype(module)] * math.sqrt(kept.numel()) * 8
        distance = float((whole - kept).norm())
        if report is None:
            require(not kept.any(), f"{path}: holds a delta that no report has")
            require(float(whole.norm()) <= rounding, f"{path}: its delta is missing")
            return
        self._ranks(path, report, max_rank)
        if report.energy_lost is None:
            require(
                distance <= rounding,
                f"{path}: differs from the exact sum by {distance:.3e}, more than {rounding:.3e}",
            )
        self._energies(path, report, wanted, float(whole.norm()) ** 2, distance, rounding)
        if self._is_exact and not path.endswith(FUSED_MLP):
            self._call(path, kept)

    def _call(self, path: str, kept: torch.Tensor) -> None:
        """The layer itself answers with what it holds."""
        x = torch.randn(3, kept.shape[1], generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            before, now = (m.get_submodule(path)(x) for m in (self._base, self._model))
            added = oracle.bias(self._model, path) - oracle.bias(self._base, path)
        expected = x.double() @ kept.mT + added
        found = (now - before).double()
        if oracle.is_modulation(path):
            found = found[:, oracle.modulation_positions(found.shape[1])]
        size = float(before.norm()) + float(expected.norm())
        off = float((found - expected).norm())
        require(off <= CALLED * size, f"{path}: called, it is off by {off:.2e} of {size:.2e}")

    def _ranks(self, path: str, report: SlotReport, max_rank: int | str | None) -> None:
        module = self._model.get_submodule(path)
        base = models.base_rank(self._base, path)
        if hasattr(module, "proj_down"):
            down, up = module.proj_down, module.proj_up
            added = down.shape[1] - base
            require(down.shape[1] == up.shape[1], f"{path}: halves of different rank")
            require(down.shape[1] % 16 == 0, f"{path}: a rank of {down.shape[1]}")
            require(down.shape[1] <= models.MOST_RANK, f"{path}: a rank of {down.shape[1]}")
        else:
            held = module._buffers.get("qwenlora_down")
            added = 0 if held is None else held.shape[0]
        require(report.rank_added == added, f"{path}: {report.rank_added} ranks said, {added} held")
        require(report.rank <= report.rank_added, f"{path}: more ranks than it holds")
        require(report.base_rank == base, f"{path}: a base of {report.base_rank}")
        if isinstance(max_rank, int):
            require(added <= -(-max_rank // 16) * 16, f"{path}: {added} ranks of {max_rank}")
        self._parts(path, module, report)

    def _parts(self, path: str, module: torch.nn.Module, report: SlotReport) -> None:
        """Said are the slot's own parts; offloaded blocks also hold zeros for each other's."""
        padded = bool(self._model.offload) and oracle.number_of(path) is not None
        own, held = (oracle.part_counts(module, with_zeros=zeros) for zeros in (False, True))
        least = own if padded else held
        for said, name in ((int(report.dense), "dense"), (report.krons, "krons")):
            require(
                least[name] <= said <= held[name],
                f"{path}: {name} said {said}, {least[name]} to {held[name]} held",
            )

    def _energies(
        self,
        path: str,
        report: SlotReport,
        wanted: Slot,
        energy: float,
        distance: float,
        rounding: float,
    ) -> None:
        """Energies, within rounding and what iterations leave."""
        share = report.energy_lost or 0.0
        terms = energy + (FLOAT32 * wanted.size) ** 2
        slack = 2 * distance * rounding + rounding**2 + ENERGY * terms
        require(share >= 0, f"{path}: a share of {share}")
        if report.energy_is_bound:
            held = share == math.inf or distance**2 <= share * energy + slack
            require(
                held, f"{path}: at most {share:.4f} said of {energy:.3e}, {distance**2:.3e} lost"
            )
            require(
                energy <= report.energy * (1 + ENERGY) + slack, f"{path}: more energy than said"
            )
            require(wanted.fulls > 0 and wanted.loras > 1, f"{path}: a bound that needs not be one")
        elif report.energy_lost is not None:
            require(
                abs(distance**2 - share * energy) <= slack,
                f"{path}: {share:.5f} said to be lost of {energy:.3e}, {distance**2:.3e} is",
            )
        if report.energy is not None:
            self._energy += energy
            self._lost += distance**2 if report.energy_lost is not None else 0.0
            self._rounding += slack
            if not report.energy_is_bound:
                off = abs(report.energy - energy)
                most = ENERGY * terms + 2 * rounding * math.sqrt(energy) + rounding**2
                require(
                    off <= most, f"{path}: an energy of {report.energy:.4e}, it is {energy:.4e}"
                )

    def _values(self) -> None:
        for layer in models.layers_of(self._model):
            if not (layer.is_norm or layer.has_bias):
                continue
            wanted = self._wanted.slots.get(layer.slot, Slot()).value
            read = _norm if layer.is_norm else oracle.bias
            before, now = read(self._base, layer.slot), read(self._model, layer.slot)
            if wanted is None or not wanted.any():
                require(torch.equal(before, now), f"{layer.slot}: its stored values differ")
                continue
            parameter = "weight" if layer.is_norm else "bias"
            dtype = getattr(self._model.get_submodule(layer.slot), parameter).dtype
            expected = (before + wanted).to(dtype).double()
            close = torch.finfo(dtype).eps * (expected.abs() + 1e-6)
            require(bool(((now - expected).abs() <= close).all()), f"{layer.slot}: stored values")
            report = self._reported.get(layer.slot)
            require(report is not None, f"{layer.slot}: changed, and in no report")
            require(parameter in report.values, f"{layer.slot}: {parameter} is not reported")

    def _whole(self) -> None:
        report = self._report
        grown = _bytes(self._model) - _bytes(self._base)
        require(report.added_bytes == grown, f"{report.added_bytes} bytes said, {grown} grown")
        worst = max((slot.energy_lost or 0.0 for slot in report.slots), default=0.0)
        require(report.energy_lost == worst, "the worst loss is not the worst")
        if not self._energy:
            return
        share, slack = self._lost / self._energy, self._rounding / self._energy
        total = report.total_energy_lost
        if report.energy_is_bound:
            require(share <= total + slack, f"at most {total:.5f} lost in all, {share:.5f} is")
        else:
            require(abs(share - total) <= 2 * slack, f"{total:.5f} lost in all, {share:.5f} is")

    def _loras(self) -> None:
        for at, lora in enumerate(self._report.loras):
            zero, said = self._wanted.zero[at], set(lora.zero_slots)
            require(said == zero, f"{lora.name}: zero in {zero ^ said}")
            all_zero = bool(said) and len(said) == self._wanted.held[at]
            require(lora.all_zero == all_zero, f"{lora.name}: all zero said {lora.all_zero}")
            matter = any(skip.matters for skip in lora.skipped)
            require(lora.complete != matter, f"{lora.name}: complete said {lora.complete}")


def _dtype(module: torch.nn.Module) -> torch.dtype:
    for name in ("proj_down", "wscales", "weight"):
        tensor = getattr(module, name, None)
        if tensor is not None:
            return tensor.dtype
    raise TypeError(f"not a layer: {type(module).__name__}")


def _norm(model: torch.nn.Module, path: str) -> torch.Tensor:
    return model.get_submodule(path).weight.detach().double()


def _bytes(model: torch.nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
