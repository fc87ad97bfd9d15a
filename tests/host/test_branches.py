"""Branches of one loaded model in a real ComfyUI: each run gets exactly what its clone asks for."""

from __future__ import annotations

import copy
import gc
import threading
from typing import TYPE_CHECKING

import pytest
import torch

import qwenlora
from qwenlora import ComfyQwenImageWrapper, ComposeOptions, LoraSet, Placement
from qwenlora.model.lock import lock_of
from qwenlora.runtime import OPTIONS_KEY

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCKS = 2


@pytest.fixture
def two(Draft, tmp_path):
    """Two LoRAs: slots of both, slots of one only, different ranks."""
    files = []
    for seed, own in ((1, ("attn.to_k", "img_mlp.net.2")), (2, ("txt_mod.1", "attn.to_add_out"))):
        draft = Draft(seed)
        for block in range(BLOCKS):
            for name in ("attn.to_q", "img_mlp.net.0.proj", "img_mod.1", *own):
                draft.add(f"transformer_blocks.{block}.{name}", 4 * seed)
        draft.add("proj_out", 4).add("img_in", 4)
        files.append(draft.save(tmp_path / f"{seed}.safetensors"))
    return files


@pytest.fixture
def loaded(emulated_qwen):
    """A loaded model whose transformer has a runtime, as after our nodes have run once."""
    ComfyQwenImageWrapper.of(emulated_qwen.model.diffusion_model)
    return emulated_qwen


@pytest.fixture
def fresh(qwen, nunchaku):
    """Sample a model that never saw anything else; its stack is composed beforehand."""
    models = {}

    def sample(loras=(), *, layers=BLOCKS, **job):
        key = (str(loras), layers)
        if key not in models:
            models[key] = model = nunchaku.emulated_qwen(qwen.small_qwen(num_layers=layers))
            qwenlora.compose_loras(model.model.diffusion_model, loras)
        return qwen.ksample(models[key], **job)

    return sample


def branch(patcher, loras=(), **options):
    """A clone that asks for a stack, as a node makes it."""
    clone = patcher.clone()
    clone.model_options["transformer_options"][OPTIONS_KEY] = LoraSet.of(loras, **options)
    return clone


def in_turns(jobs: list[Callable[[Callable[[], None]], None]]) -> None:
    """Run jobs in threads, one at a time; each goes on until it calls what it is given."""
    turn = threading.Condition()
    waiting = list(range(len(jobs)))  # who runs next is the first
    errors: list[BaseException] = []

    def wait_for(index: int) -> None:
        turn.wait_for(lambda: waiting[0] == index)

    def work(index: int) -> None:
        def pass_on() -> None:
            waiting.append(waiting.pop(0))
            turn.notify_all()
            wait_for(index)

        with turn:
            wait_for(index)
            try:
                jobs[index](pass_on)
            except BaseException as error:  # noqa: BLE001 - raised again below
                errors.append(error)
            waiting.pop(0)
            turn.notify_all()

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


# ---- branches ----


def test_branches_one_after_the_other(loaded, qwen, two, fresh):
    expected = [fresh(path, seed=3) for path in two]
    base = fresh(seed=3)
    assert len({tensor.sum().item() for tensor in (*expected, base)}) == 3
    branches = [branch(loaded, path) for path in two]
    for _ in range(2):
        for clone, wanted in zip(branches, expected, strict=True):
            assert torch.equal(qwen.ksample(clone, seed=3), wanted)
            assert torch.equal(qwen.ksample(loaded, seed=3), base)


def test_branches_alternating_at_every_step(loaded, qwen, two, fresh, composed, monkeypatch):
    stacks = [two[0], (), two[1], [two[0], (two[1], -0.5)]]
    expected = [fresh(stack, seed=7, steps=4) for stack in stacks]
    models = [branch(loaded, stack) if stack else loaded for stack in stacks]
    mine, samples, order = threading.local(), [None] * len(stacks), []

    def after_step(*_):
        order.append(mine.index)
        mine.pass_on()

    def job(index):
        def run(pass_on):
            mine.index, mine.pass_on = index, pass_on
            samples[index] = qwen.ksample(models[index], seed=7, steps=4)

        return run

    with monkeypatch.context() as patch:
        patch.setattr("latent_preview.prepare_callback", lambda *_, **__: after_step)
        in_turns([job(index) for index in range(len(stacks))])
    assert order == [0, 1, 2, 3] * 4
    assert len(composed) == 16
    for sample, wanted in zip(samples, expected, strict=True):
        assert torch.equal(sample, wanted)
    assert torch.equal(qwen.ksample(loaded, seed=7, steps=4), expected[1])


@pytest.mark.parametrize("asked", ["absent", "None", "empty", "strength 0"])
def test_without_loras_it_is_the_base_bit_for_bit(loaded, qwen, two, fresh, probe, asked):
    transformer = loaded.model.diffusion_model
    before, base = probe.snapshot(transformer), fresh()
    qwen.ksample(branch(loaded, two))
    clone = loaded.clone()
    options = clone.model_options["transformer_options"]
    if asked != "absent":
        zero = LoraSet.of([(path, 0.0) for path in two])
        options[OPTIONS_KEY] = {"None": None, "empty": LoraSet.of(), "strength 0": zero}[asked]
    assert torch.equal(qwen.ksample(clone), base)
    assert before.differences(probe.snapshot(transformer)) == []


def test_a_clone_of_a_clone(loaded, qwen, two, fresh):
    first = branch(loaded, two[0])
    second = first.clone()
    options = second.model_options["transformer_options"]
    options[OPTIONS_KEY] = options[OPTIONS_KEY].extended((two[1], 0.5))
    assert torch.equal(qwen.ksample(second), fresh([two[0], (two[1], 0.5)]))
    assert torch.equal(qwen.ksample(first.clone().clone()), fresh(two[0]))
    bypassed = second.clone()
    del bypassed.model_options["transformer_options"][OPTIONS_KEY]
    assert torch.equal(qwen.ksample(bypassed), fresh())
    assert torch.equal(qwen.ksample(first), fresh(two[0]))


def test_the_input_patcher_is_unchanged(loaded, qwen, two):
    def everything():
        seen = {name: (id(value), repr(value)) for name, value in vars(loaded).items()}
        del seen["model"]
        return seen

    qwen.ksample(loaded)
    model, modules = loaded.model, dict(loaded.model.named_modules())
    before = everything()
    assert before.keys() > {"model_options", "patches", "object_patches", "attachments", "wrappers"}
    clone = branch(loaded, two)
    assert everything() == before
    qwen.ksample(clone)
    assert everything() == before
    assert loaded.model is clone.model is model
    assert dict(model.named_modules()) == modules
    assert OPTIONS_KEY not in loaded.model_options["transformer_options"]
    assert clone.get_key_patches().keys() == loaded.get_key_patches().keys()


def test_the_same_set_again_composes_nothing(loaded, qwen, two, composed):
    first = qwen.ksample(branch(loaded, two), steps=4)
    assert len(composed) == 1
    for clone in (branch(loaded, two), branch(loaded, two).clone()):
        assert torch.equal(qwen.ksample(clone, steps=4), first)
    loaded.detach()
    assert torch.equal(qwen.ksample(branch(loaded, two), steps=4), first)
    assert len(composed) == 1
    qwen.ksample(branch(loaded, two[::-1]))
    assert len(composed) == 2


def test_an_edited_file_is_composed_again(loaded, qwen, two, fresh, composed):
    stale = branch(loaded, two[0])
    qwen.ksample(stale)
    two[0].write_bytes(two[1].read_bytes())
    edited = branch(loaded, two[0])
    assert torch.equal(qwen.ksample(edited), fresh(two[1]))
    assert len(composed) == 2
    # The set of before the edit never gets the new contents.
    qwenlora.clear_cache()
    with pytest.raises(qwenlora.QwenLoraError, match="changed"):
        qwen.ksample(stale)
    assert torch.equal(qwen.ksample(edited), fresh(two[1]))


def test_a_deep_copy_of_the_model_has_branches_of_its_own(loaded, qwen, two, fresh):
    expected = [fresh(path) for path in two]
    first = branch(loaded, two[0])
    qwen.ksample(first)
    twin = loaded.clone()
    twin.model = copy.deepcopy(loaded.model)
    other = branch(twin, two[1])
    for _ in range(2):
        assert torch.equal(qwen.ksample(other), expected[1])
        assert torch.equal(qwen.ksample(first), expected[0])
    assert torch.equal(qwen.ksample(twin), fresh())
    of_twin = ComfyQwenImageWrapper.of(twin.model.diffusion_model)
    assert of_twin.transformer is twin.model.diffusion_model
    assert of_twin is not ComfyQwenImageWrapper.of(loaded.model.diffusion_model)


def test_a_deep_copy_of_a_transformer_put_in_the_models_place(loaded, qwen, two, fresh):
    # What the old pack's loaders do to a model.
    first = branch(loaded, two[0])
    qwen.ksample(first)
    loaded.model.diffusion_model = copy.deepcopy(loaded.model.diffusion_model)
    assert torch.equal(qwen.ksample(branch(loaded, two[1])), fresh(two[1]))
    assert torch.equal(qwen.ksample(loaded), fresh())


@pytest.mark.parametrize("resident", [1, 2])
def test_offload_switched_between_runs(graph, qwen, nunchaku, Draft, tmp_path, fresh, resident):
    layers = 4
    loras = [
        Draft.full(seed, rank=4 * seed, blocks=blocks).save(tmp_path / f"{seed}.safetensors")
        for seed, blocks in ((1, layers), (2, 2))
    ]
    model = nunchaku.emulated_qwen(qwen.small_qwen(num_layers=layers))
    transformer = model.model.diffusion_model
    ComfyQwenImageWrapper.of(transformer)
    stacks = [*loras, (), loras[0]]
    expected = [fresh(stack, layers=layers) for stack in stacks]
    for offload in (False, True, False, True):
        transformer.set_offload(offload, num_blocks_on_gpu=resident)
        for stack, wanted in zip(stacks, expected, strict=True):
            sample = qwen.ksample(branch(model, stack))
            assert (sample - wanted).norm() <= 1e-6 * wanted.norm()
    transformer.set_offload(False)
    assert torch.equal(qwen.ksample(model), expected[2])


def test_100_alternations_grow_nothing(loaded, qwen, two):
    def tensors():
        gc.collect()
        found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        storages: dict[int, int] = {}
        for storage in (tensor.untyped_storage() for tensor in found):
            # An arena begins where its first slot does, and objects come in any order.
            begin = storage.data_ptr()
            storages[begin] = max(storage.nbytes(), storages.get(begin, 0))
        modules = list(loaded.model.modules())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
        return len(found), sum(storages.values()), hooks

    branches = [branch(loaded, two[0]), loaded, branch(loaded, two[1])]
    sizes = []
    for _ in range(4):
        for _ in range(100 // 4 // 3 + 1):
            for clone in branches:
                qwen.ksample(clone, steps=1, cfg=1.0)
        sizes.append(tensors())
    assert sizes[1:] == sizes[:1] * 3


# ---- errors and interruptions ----


class Stop:
    """A progress callback that presses the host's stop button before its nth slot."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.calls = 0

    def __call__(self, phase: str, done: int, total: int) -> None:
        import comfy.model_management
        import nodes

        self.calls += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                nodes.interrupt_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()


@pytest.mark.parametrize("placement", [Placement.WHOLE, Placement.BY_PATH])
def test_interrupted_at_any_slot_while_composing(loaded, qwen, two, fresh, probe, placement):
    from comfy.model_management import InterruptProcessingException

    transformer, stop = loaded.model.diffusion_model, Stop()
    expected = [fresh(path, steps=1) for path in two]
    options = ComposeOptions(placement=placement, progress=stop)
    first, second = (branch(loaded, path, options=options) for path in two)
    untouched = probe.snapshot(transformer)
    qwen.ksample(first, steps=1)
    before = probe.snapshot(transformer)
    stop.calls = 0
    assert torch.equal(qwen.ksample(second, steps=1), expected[1])
    calls = stop.calls
    assert calls > 2 * len(two)
    for left in range(calls):
        assert torch.equal(qwen.ksample(first, steps=1), expected[0])
        stop.left = left
        with pytest.raises(InterruptProcessingException):
            qwen.ksample(second, steps=1)
        stop.left = None
        assert not lock_of(transformer).is_mine()
        report = qwenlora.applied(transformer)
        after = probe.snapshot(transformer)
        if placement is Placement.WHOLE:
            assert [lora.name for lora in report.loras] == [two[0].stem]
            assert before.differences(after) == []
        else:
            assert report.failure.startswith("InterruptProcessingException")
            assert set(untouched.differences(after)) <= {":"}  # where the failure is recorded
        following = left % 2
        assert torch.equal(qwen.ksample((first, second)[following], steps=1), expected[following])
    assert torch.equal(qwen.ksample(loaded, steps=1), fresh(steps=1))


@pytest.mark.parametrize("kind", ["error", "keyboard", "stop"])
@pytest.mark.parametrize("place", ["img_in", "transformer_blocks.1", "proj_out"])
def test_an_end_within_the_forward(loaded, qwen, two, fresh, kind, place):
    from comfy.model_management import InterruptProcessingException

    errors = {"error": RuntimeError, "keyboard": KeyboardInterrupt}
    error = errors.get(kind, InterruptProcessingException)
    transformer, calls = loaded.model.diffusion_model, []
    first, second = (branch(loaded, path) for path in two)

    def failing(*_):
        calls.append(None)
        if len(calls) == 2:  # in the second step
            raise error("injected")

    qwen.ksample(first)
    handle = transformer.get_submodule(place).register_forward_pre_hook(failing)
    with pytest.raises(error):
        qwen.ksample(second)
    handle.remove()
    expected = [fresh(two[1]), fresh(two[0]), fresh()]
    for model, wanted in zip((second, first, loaded), expected, strict=True):
        assert torch.equal(qwen.ksample(model), wanted)
    assert not lock_of(transformer).is_mine()


def test_an_offloaded_forward_that_ended_early(graph, qwen, nunchaku, two, fresh):
    model = nunchaku.emulated_qwen(qwen.small_qwen(num_layers=4))
    transformer = model.model.diffusion_model
    ComfyQwenImageWrapper.of(transformer)
    transformer.set_offload(True)
    first, second = (branch(model, path) for path in two)
    qwen.ksample(first)
    handle = transformer.offload_manager.buffer_blocks[1].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(RuntimeError("injected"))
    )
    with pytest.raises(RuntimeError, match="injected"):
        qwen.ksample(second)
    handle.remove()
    for run, stack in ((first, two[0]), (second, two[1]), (model, ())):
        wanted = fresh(stack, layers=4)
        assert (qwen.ksample(run) - wanted).norm() <= 1e-6 * wanted.norm()


# ---- what a run may bring along ----


def _jobs(qwen):
    generator = torch.Generator().manual_seed(5)
    reference = torch.randn(1, 16, 1, 6, 4, generator=generator)
    larger = torch.randn(1, 16, 1, 5, 7, generator=generator)
    image = {"samples": torch.randn(1, 16, 1, 7, 9, generator=generator)}
    return {
        "no cfg": {"cfg": 1.0},
        "unequal prompts": {"negative": qwen.conditioning(2, tokens=3)},
        "three conds": {
            "positive": qwen.conditioning(1) + qwen.conditioning(7, tokens=9, strength=0.5),
            "negative": qwen.conditioning(2, tokens=2),
        },
        "timed conds": {
            "positive": qwen.conditioning(1, end_percent=0.5)
            + qwen.conditioning(7, tokens=9, start_percent=0.5)
        },
        "batch 2": {"latent": qwen.empty_latent(batch=2)},
        "batch 4": {"latent": qwen.empty_latent(batch=4)},
        "batch 4 of unequal prompts": {
            "latent": qwen.empty_latent(batch=4),
            "positive": qwen.conditioning(1, batch=4),
            "negative": qwen.conditioning(2, tokens=3),
        },
        "5-D, odd size, image to image": {"latent": image, "denoise": 0.6},
        "reference latents": {
            "positive": qwen.conditioning(1, reference_latents=[reference, larger]),
            "negative": qwen.conditioning(2, tokens=3, reference_latents=[reference]),
        },
    }


@pytest.mark.parametrize(
    "case",
    [
        "no cfg",
        "unequal prompts",
        "three conds",
        "timed conds",
        "batch 2",
        "batch 4",
        "batch 4 of unequal prompts",
        "5-D, odd size, image to image",
        "reference latents",
    ],
)
def test_conditions_and_latents_of_every_kind(loaded, qwen, two, fresh, composed, case):
    job = _jobs(qwen)[case]
    base = fresh(**job)
    for path in two:
        sample = qwen.ksample(branch(loaded, path), **job)
        assert torch.equal(sample, fresh(path, **job))
        assert not torch.equal(sample, base)
    assert len(composed) == 2
    assert torch.equal(qwen.ksample(loaded, **job), base)


def test_options_of_others_pass_untouched(loaded, qwen, two, fresh):
    from comfy.patcher_extension import WrappersMP

    mark, seen = object(), []

    def note(executor, *args, **kwargs):
        seen.append((args[6], kwargs))
        return executor(*args, **kwargs)

    clone = branch(loaded, two)
    wanted = clone.model_options["transformer_options"][OPTIONS_KEY]
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another", note)
    options = clone.model_options["transformer_options"]
    options["another's"] = mark
    blocks = []

    def replace(args, extra):
        blocks.append(set(args))
        return extra["original_block"](args)

    clone.set_model_patch_replace(replace, "dit", "double_block", 1)
    assert torch.equal(qwen.ksample(clone, steps=2), fresh(two, steps=2))
    assert len(seen) == len(blocks) == 2
    for passed, kwargs in seen:
        assert passed["another's"] is mark
        assert passed[OPTIONS_KEY] is wanted
        assert ("double_block", 1) in passed["patches_replace"]["dit"]
        assert kwargs == {"control": None}


# ---- forward signatures ----


class Inputs:
    """What a forward is called with; `call` does it as the host of one version does."""

    def __init__(self, transformer) -> None:
        generator = torch.Generator().manual_seed(3)

        def random(*shape):
            return torch.randn(shape, generator=generator)

        self.x, self.timestep = random(1, 16, 1, 8, 8), torch.tensor([0.4])
        self.context, self.references = random(1, 5, 96), [random(1, 16, 1, 6, 4)]
        self.control = {"input": [0.1 * random(1, 16, transformer.inner_dim), None]}

    def call(self, transformer, version, style, options):
        """Position 7 holds the options in every version; what is before it changed in 0.6."""
        middle = {"guidance": None, "ref_latents": self.references}
        if version != "0.3.49 to 0.5":
            middle = {"ref_latents": self.references, "additional_t_cond": None}
        first = {"x": self.x, "timestep": self.timestep, "context": self.context}
        every = {**first, "attention_mask": None, **middle, "transformer_options": options}
        with torch.inference_mode():
            if style == "positional":
                return transformer(*every.values(), control=self.control)
            if style == "as the host":  # what `BaseModel._apply_model` does
                del every["x"], every["timestep"]
                return transformer(self.x, self.timestep, **every, control=self.control)
            return transformer(**every, control=self.control)


def with_signature(transformer, version):
    """Let the transformer take its arguments in the order of a version; returns what it took."""
    taken, parent = [], type(transformer)
    if version == "0.3.49 to 0.5":

        class Versioned(parent):
            def forward(
                self,
                x,
                timestep,
                context,
                attention_mask=None,
                guidance=None,
                ref_latents=None,
                transformer_options={},  # noqa: B006 - the host's own signature
                control=None,
                **kwargs,
            ):
                assert guidance is None
                taken.append((x, timestep, context, ref_latents, transformer_options, control))
                return super().forward(
                    x, timestep, context, attention_mask, guidance, ref_latents,
                    transformer_options, control=control, **kwargs,
                )  # fmt: skip

    else:

        class Versioned(parent):
            def forward(
                self,
                x,
                timestep,
                context,
                attention_mask=None,
                ref_latents=None,
                additional_t_cond=None,
                transformer_options={},  # noqa: B006 - the host's own signature
                control=None,
                **kwargs,
            ):
                assert additional_t_cond is None
                taken.append((x, timestep, context, ref_latents, transformer_options, control))
                return super().forward(
                    x, timestep, context, attention_mask, None, ref_latents,
                    transformer_options, control=control, **kwargs,
                )  # fmt: skip

    transformer.__class__ = Versioned
    return taken


@pytest.mark.parametrize("style", ["positional", "as the host", "by name"])
@pytest.mark.parametrize("version", ["0.3.49 to 0.5", "0.6 and later"])
def test_forward_signatures(emulated_qwen, two, probe, version, style):
    transformer = emulated_qwen.model.diffusion_model
    inputs, oldest = Inputs(transformer), "0.3.49 to 0.5"
    expected = {}
    for path in (*two, None):
        qwenlora.compose_loras(transformer, [path] if path else [])
        expected[path] = inputs.call(transformer, oldest, "positional", {})
    taken = with_signature(transformer, version)
    ComfyQwenImageWrapper.of(transformer)
    for path in (two[0], None, two[1], two[0]):
        options = {OPTIONS_KEY: LoraSet.of(path or ())} if path else {}
        options["another's"] = object()
        out = inputs.call(transformer, version, style, options)
        assert torch.equal(out, expected[path])
        x, timestep, context, references, passed, control = taken[-1]
        assert (x, timestep, context) == (inputs.x, inputs.timestep, inputs.context)
        assert references is inputs.references
        assert passed is options
        assert control is inputs.control


def test_a_forward_of_the_real_class_by_position(loaded, two):
    # 0.3.75 hands on all seven by position to `_forward`, behind the wrappers.
    transformer = loaded.model.diffusion_model
    inputs = Inputs(transformer)
    qwenlora.compose_loras(transformer, two[0])
    expected = inputs.call(transformer, "0.3.49 to 0.5", "positional", {})
    qwenlora.reset_loras(transformer)
    base = inputs.call(transformer, "0.3.49 to 0.5", "positional", {})
    assert not torch.equal(expected, base)
    for style in ("positional", "as the host", "by name"):
        for stack, wanted in ((two[0], expected), ((), base)):
            options = {OPTIONS_KEY: LoraSet.of(stack)}
            assert torch.equal(inputs.call(transformer, "0.3.49 to 0.5", style, options), wanted)
