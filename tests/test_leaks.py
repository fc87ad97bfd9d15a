"""What was let go is gone at once, without the collector of cycles; nothing piles up."""

from __future__ import annotations

import _thread
import copy
import gc
import os
import sys
import time
import weakref
from typing import TYPE_CHECKING

import pytest
import torch

import qwenlora
from qwenlora import ComfyQwenImageWrapper, ComposeOptions, LoraSet, Placement
from qwenlora.errors import ModelStateError, NonFiniteError, OtherModelError
from qwenlora.source.read_ahead import files

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Only counts of references free anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def scene(make_model, Draft, tmp_path, without_collector):
    return Scene(make_model, Draft, tmp_path)


class Scene:
    """A model nobody else holds, and a LoRA file for it."""

    def __init__(self, make_model, draft, folder) -> None:
        self.model = make_model(num_layers=2)
        self.path = draft.full(seed=1, rank=4, blocks=2).save(folder / "lora.safetensors")
        self.other = draft.full(seed=2, rank=8, blocks=2).save(folder / "other.safetensors")
        self.damaged = draft.full(seed=3, blocks=2)
        key = self.damaged.key("transformer_blocks.1.attn.to_q", "down")
        self.damaged.tensors[key][0, 0] = float("nan")
        self.damaged_path = self.damaged.save(folder / "damaged.safetensors")

    def forward(self, **options) -> None:
        with torch.no_grad():
            self.model(
                hidden_states=torch.zeros(1, 12, 64),
                encoder_hidden_states=torch.zeros(1, 5, 96),
                timestep=torch.tensor([0.5]),
                img_shapes=[[(1, 3, 4)]],
                **options,
            )


def looked_at(scene):
    qwenlora.applied(scene.model)


def planned(scene):
    from qwenlora.compose.planning import plan_report

    plan_report(scene.model, LoraSet.of(scene.path))


def composed(scene):
    qwenlora.compose_loras(scene.model, scene.path)


def composed_by_path(scene):
    options = ComposeOptions(placement=Placement.BY_PATH)
    qwenlora.compose_loras(scene.model, [scene.path, scene.other], options=options)


def composed_from_memory(scene):
    qwenlora.compose_loras(scene.model, scene.damaged.tensors | _finite(scene.damaged))


def _finite(draft):
    return {key: torch.nan_to_num(tensor) for key, tensor in draft.tensors.items()}


def compressed(scene):
    qwenlora.compose_loras(scene.model, [scene.path, scene.other], max_rank=4)


def rescaled_and_switched(scene):
    for stack in ((scene.path, 1.0), (scene.path, 0.5), scene.other, (scene.path, 0.5)):
        qwenlora.compose_loras(scene.model, stack)


def reset(scene):
    composed(scene)
    qwenlora.reset_loras(scene.model)


def wrapped(scene):
    ComfyQwenImageWrapper.of(scene.model).loras.append(scene.path)


def wrapped_and_run(scene):
    wrapped(scene)
    scene.forward()
    ComfyQwenImageWrapper.of(scene.model)(
        hidden_states=torch.zeros(1, 12, 64),
        encoder_hidden_states=torch.zeros(1, 5, 96),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 3, 4)]],
        transformer_options={"qwenlora": LoraSet.of(scene.other)},
    )


def copied(scene):
    wrapped_and_run(scene)
    scene.model = copy.deepcopy(scene.model)
    scene.forward()


def offloaded(scene):
    scene.model.set_offload(True)
    wrapped_and_run(scene)
    composed(scene)


def moved(scene):
    composed(scene)
    scene.model.to(torch.float64).to(torch.float32)


def refused(scene):
    with pytest.raises(OtherModelError):
        qwenlora.compose_loras(scene.model, {"lora_te1_x.lora_down.weight": torch.ones(2, 2)})


def damaged(scene):
    for source in (scene.damaged.tensors, scene.damaged_path):
        for placement in (Placement.WHOLE, Placement.BY_PATH):
            options = ComposeOptions(placement=placement)
            with pytest.raises(NonFiniteError):
                qwenlora.compose_loras(scene.model, source, options=options)


def interrupted_while_composing(scene):
    def progress(phase, done, total):
        if done == 3:
            raise KeyboardInterrupt

    for placement in (Placement.WHOLE, Placement.BY_PATH):
        options = ComposeOptions(placement=placement, progress=progress)
        with pytest.raises(KeyboardInterrupt):
            qwenlora.compose_loras(scene.model, scene.path, options=options)


def entered_again(scene):
    def progress(phase, done, total):
        scene.forward()

    wrapped(scene)
    options = ComposeOptions(progress=progress)
    with pytest.raises(ModelStateError):
        qwenlora.compose_loras(scene.model, scene.path, options=options)


def _interrupted_forward(scene, error):
    def fail(*_):
        raise error("injected")

    wrapped_and_run(scene)
    handle = scene.model.proj_out.register_forward_pre_hook(fail)
    with pytest.raises(error):
        scene.forward()
    handle.remove()


def interrupted_while_running(scene):
    _interrupted_forward(scene, KeyboardInterrupt)


def failed_while_running(scene):
    _interrupted_forward(scene, RuntimeError)


USES = [
    looked_at,
    planned,
    composed,
    composed_by_path,
    composed_from_memory,
    compressed,
    rescaled_and_switched,
    reset,
    wrapped,
    wrapped_and_run,
    copied,
    offloaded,
    moved,
    refused,
    damaged,
    interrupted_while_composing,
    entered_again,
    interrupted_while_running,
    failed_while_running,
]


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_a_model_that_was_let_go_is_gone_at_once(use, scene):
    use(scene)
    parts = [scene.model, scene.model.transformer_blocks[1].attn.to_qkv, scene.model.img_in]
    gone = [weakref.ref(part) for part in parts]
    gone.append(weakref.ref(parts[1].proj_down.untyped_storage()))
    manager = getattr(scene.model, "offload_manager", None)
    gone += [] if manager is None else [weakref.ref(manager)]
    del parts, manager, scene.model
    assert [reference() for reference in gone] == [None] * len(gone)


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_what_was_composed_is_gone_after_a_reset(use, scene):
    use(scene)
    slot = scene.model.transformer_blocks[1].attn.to_qkv
    arena = weakref.ref(slot.proj_down.untyped_storage())
    is_composed = slot.proj_down.shape[1] > 32
    qwenlora.reset_loras(scene.model)
    assert slot.proj_down.shape[1] == 32
    if is_composed:
        assert arena() is None


@pytest.mark.parametrize("kind", ["file", "tensors"])
def test_a_set_and_its_sources_are_gone_when_nothing_wants_them(kind, scene):
    source = scene.path if kind == "file" else _finite(scene.damaged)
    wanted = LoraSet.of(source)
    references = [weakref.ref(wanted), *map(weakref.ref, wanted.sources)]
    if kind == "tensors":
        references += [weakref.ref(next(iter(source.values())))]
    ComfyQwenImageWrapper.of(scene.model).reconcile({"qwenlora": wanted})
    del wanted, source
    ComfyQwenImageWrapper.of(scene.model).reconcile({"qwenlora": None})
    qwenlora.reset_loras(scene.model)
    assert [reference() for reference in references] == [None] * len(references)


def test_a_wrapper_is_gone_with_its_transformer(scene):
    wrapped_and_run(scene)
    wrapper = weakref.ref(ComfyQwenImageWrapper.of(scene.model))
    copied_model = copy.deepcopy(scene.model)
    its = weakref.ref(ComfyQwenImageWrapper.of(copied_model))
    del scene.model
    assert wrapper() is None
    assert its() is not None
    del copied_model
    assert its() is None


def _closure(model):
    layer = model.proj_out
    own = layer.forward
    # What caches of a step's blocks do: a layer knows its transformer.
    layer.forward = lambda x: own(x) if model is not None else x


def _attribute(model):
    object.__setattr__(model.transformer_blocks[0], "transformer", model)


def _hook(model):
    model.transformer_blocks[0].register_forward_hook(lambda *_: model and None)


@pytest.mark.slow
@pytest.mark.parametrize("tie", [_closure, _attribute, _hook])
@pytest.mark.parametrize("use", [looked_at, composed, reset, wrapped_and_run, offloaded])
def test_a_model_that_its_layers_know_is_gone_with_the_next_collection(tie, use, scene):
    tie(scene.model)
    use(scene)
    gone = weakref.ref(scene.model)
    del scene.model
    gc.collect()
    assert gone() is None


# ---- many of them ----


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def _interrupt(phase: str, done: int, total: int) -> None:
    raise KeyboardInterrupt


def _one_life(base, stacks, number: int) -> None:
    model = copy.deepcopy(base)
    wrapper = ComfyQwenImageWrapper.of(model)
    if number % 3 == 0:
        model.set_offload(True)
    LoraSet.of(stacks[number % 2]).read_ahead(limit_bytes=1 << 30)
    wrapper.reconcile({"qwenlora": LoraSet.of(stacks[number % 2])})
    wrapper.reconcile({"qwenlora": LoraSet.of((stacks[number % 2], 0.5))})
    if number % 5 == 0:
        options = ComposeOptions(progress=_interrupt)
        with pytest.raises(KeyboardInterrupt):
            qwenlora.compose_loras(model, stacks[2], options=options)
    if number % 2:
        qwenlora.reset_loras(model)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux tells of the process")
def test_three_hundred_lives(make_model, Draft, tmp_path):
    base = make_model()
    stacks = []
    for seed in range(3):
        draft = Draft(seed)
        for name in ("attn.to_q", "img_mod.1", "img_mlp.net.2"):
            draft.add(f"transformer_blocks.0.{name}", 16)
        stacks.append(draft.save(tmp_path / f"{seed}.safetensors"))

    def settled() -> tuple[int, int]:
        assert files.wait(20)
        end = time.monotonic() + 20
        while _thread._count() > threads and time.monotonic() < end:
            time.sleep(0.01)
        return _thread._count(), _handles()

    threads = _thread._count()
    for number in range(30):
        _one_life(base, stacks, number)
    before, resident = settled(), _resident_bytes()
    for number in range(300):
        _one_life(base, stacks, number)
    assert settled() == before
    assert before[0] == threads
    # All of them would be three hundred models.
    model_bytes = sum(p.nbytes for p in base.parameters())
    assert _resident_bytes() - resident < 30 * model_bytes
