"""Signals at random moments of all that changes a model; `test_storm.py` runs it.

Arguments: seconds, folder with `a.safetensors` and `b.safetensors`, which are LoRAs of its model,
and seeds; each has these seconds. An odd seed turns block offload on. For each it prints how many
rounds it went and how many signals were caught. For hours:
`python tests/storm.py 3600 FOLDER 2 3`.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import io
import random
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

import qwenlora
from qwenlora import ComfyQwenImageWrapper, ComposeOptions, LoraSet, Placement, emulation
from qwenlora.merge import main as merge_main
from qwenlora.source.read_ahead import files

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, FunctionType

MODEL = emulation.EmulatedConfig(
    num_layers=2,
    heads=2,
    head_dim=64,
    axes_dims_rope=(16, 24, 24),
    joint_attention_dim=96,
    precision=emulation.Precision.EXACT,
    dtype=torch.float32,
)
HANG_SECONDS = 150


class Bell:
    """Raises as often as it is told to."""

    left = 0
    is_quiet = True

    @classmethod
    def ring(cls, _: int, frame: FrameType | None) -> None:
        if cls.left:
            cls.left -= 1
        if not cls.left:
            # What goes on after an exception that something swallowed is not to be slowed down.
            signal.setitimer(signal.ITIMER_REAL, 0)
        # What catches it here is not to be interrupted itself.
        if not cls.is_quiet and _is_in(carry_out, frame):
            cls.is_quiet = not cls.left
            raise KeyboardInterrupt


def carry_out(act: Callable[[], object]) -> None:
    act()


def _is_in(function: FunctionType, frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Storm:
    """One model and what is done to it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.a, self.b = folder / "a.safetensors", folder / "b.safetensors"
        self.model = emulation.random_transformer(MODEL)
        # What is right is what a model composed in peace holds.
        self.base = tensors_of(self.model)
        peace = copy.deepcopy(self.model)
        qwenlora.compose_loras(peace, [self.a, (self.b, 0.5)])
        self.composed = tensors_of(peace)
        self.model.set_offload(seed % 2 == 1)
        self.sources = [self._real(number) for number in range(2)]
        self.caught = self.rounds = 0
        self.lengths: dict[str, float] = {}

    def _real(self, number: int) -> str:
        """A LoRA of the real model's size, which is what can be merged."""
        name = "transformer.transformer_blocks.0.attn.to_out.0.lora_{}.weight"
        path = self.folder / f"real{number}.safetensors"
        sides = {"A": torch.ones(4, 3072), "B": torch.ones(3072, 4)}
        save_file({name.format(side): values for side, values in sides.items()}, str(path))
        return str(path)

    def acts(self) -> dict[str, Callable[[], object]]:
        model, a, b = self.model, self.a, self.b
        wrapper = ComfyQwenImageWrapper.of(model)
        by_path = ComposeOptions(placement=Placement.BY_PATH)
        one, other = LoraSet.of(a), LoraSet.of([b, (a, 0.3)])

        def reconcile() -> None:
            for wanted in (one, other, one, None):
                wrapper.reconcile({"qwenlora": wanted})

        def read_ahead() -> None:
            LoraSet.of([a, b]).read_ahead(limit_bytes=1 << 30)
            files.cancel(a)
            files.wait(20)

        def forward() -> None:
            with torch.no_grad():
                model(
                    hidden_states=torch.zeros(1, 12, 64),
                    encoder_hidden_states=torch.zeros(1, 5, 96),
                    timestep=torch.tensor([0.5]),
                    img_shapes=[[(1, 3, 4)]],
                    transformer_options={"qwenlora": one},
                )

        def merge() -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                merge_main([*self.sources, "-o", str(self.folder / "out.safetensors"), "--force"])

        return {
            "compose": lambda: qwenlora.compose_loras(model, [a, b]),
            "anew": lambda: (qwenlora.clear_cache(), qwenlora.compose_loras(model, [b, a])),
            "by path": lambda: qwenlora.compose_loras(model, [b, a], options=by_path),
            "compress": lambda: qwenlora.compose_loras(model, [a, b], max_rank=16),
            "rescale": lambda: [qwenlora.compose_loras(model, (a, s)) for s in (1, 0.5, 0.25, 1)],
            "reset": lambda: qwenlora.reset_loras(model),
            "look": lambda: qwenlora.applied(model),
            "reconcile": reconcile,
            "read ahead": read_ahead,
            "forward": forward,
            "merge": merge,
        }

    def interrupt(self, name: str, act: Callable[[], object]) -> None:
        """Run it, with a signal at a random moment of the time that it takes, or two."""
        # Nothing takes a file away after the program that wrote it was interrupted twice.
        signals = 1 if name == "merge" else self.random.choice((1, 1, 1, 2))
        moment = self.random.uniform(0, self.lengths.get(name, 0.01)) + 1e-6
        # Each is caught, also where one comes while the other is.
        with (
            contextlib.suppress(KeyboardInterrupt),
            contextlib.suppress(KeyboardInterrupt),
            contextlib.suppress(KeyboardInterrupt),
        ):
            began = time.perf_counter()
            Bell.left, Bell.is_quiet = signals, False
            signal.setitimer(signal.ITIMER_REAL, moment, self.random.choice((1e-5, 1e-4, 1e-3)))
            carry_out(act)
            if Bell.left == signals:
                Bell.left, Bell.is_quiet = 0, True
                self.lengths[name] = time.perf_counter() - began
        self.caught += signals - Bell.left
        Bell.left, Bell.is_quiet = 0, True
        signal.setitimer(signal.ITIMER_REAL, 0)

    def check(self) -> None:
        """The next change is right, and the base comes back."""
        if self.random.random() < 0.5:
            options = ComposeOptions()
            qwenlora.compose_loras(self.model, [self.a, (self.b, 0.5)], options=options)
            if not self.model.offload:
                assert same(tensors_of(self.model), self.composed), "the next change is wrong"
        qwenlora.reset_loras(self.model)
        assert same(tensors_of(self.model), self.base), "the base is not what it was"
        left = [path.name for path in self.folder.iterdir() if path.suffix == ".tmp"]
        assert not left, f"left by merge: {left}"

    def run(self, seconds: float) -> None:
        acts = self.acts()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.rounds += 1
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            names = self.random.sample(sorted(acts), 3)
            for name in names:
                self.interrupt(name, acts[name])
            self.check()
        acts["merge"]()
        assert (self.folder / "out.safetensors").exists(), "nothing was merged"
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, Bell.ring)
    storms = [Storm(seed, Path(sys.argv[2])) for seed in map(int, sys.argv[3:])]
    for storm in storms:
        storm.run(float(sys.argv[1]))
    # Behind all that merging says.
    for storm in storms:
        sys.stdout.write(f"{storm.rounds} {storm.caught}\n")
