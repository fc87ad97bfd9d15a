"""Z-Image in a real ComfyUI: the emulated model, and our nodes on it beside ComfyUI's own."""

from __future__ import annotations

import copy
import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import qwenlora
from qwenlora.emulation import SVDQW4A4Linear
from qwenlora.model.state import EMPTY, read_state

from . import test_nodes

if TYPE_CHECKING:
    from collections.abc import Iterable

pack = test_nodes.pack

EXACT = 1e-5
"""Between the emulated model in exact precision and the dense one, relative, float32."""
DELTA = 2e-5
"""Between the changes that two ways of applying a LoRA make, relative, float32."""
OVER_HOST = 1.25
"""Our error over that of ComfyUI's own merge, both in bfloat16, against float32."""

A, B = "a.safetensors", "b.safetensors"
WIDTH, HIDDEN, TIME, TEXT, PATCH = 384, 1024, 256, 128, 64
BLOCK = {
    **{f"attention.to_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "out.0")},
    "feed_forward.w1": (WIDTH, HIDDEN),
    "feed_forward.w2": (HIDDEN, WIDTH),
    "feed_forward.w3": (WIDTH, HIDDEN),
}
MODULATED = {**BLOCK, "adaLN_modulation.0": (TIME, 4 * WIDTH)}
BLOCKS = {
    "layers.0": MODULATED,
    "layers.1": MODULATED,
    "noise_refiner.0": MODULATED,
    "context_refiner.0": BLOCK,
}
OUTSIDE = {
    "all_x_embedder.2-1": (PATCH, WIDTH),
    "cap_embedder.1": (TEXT, WIDTH),
    "t_embedder.mlp.0": (TIME, WIDTH),
    "t_embedder.mlp.2": (WIDTH, TIME),
    "all_final_layer.2-1.linear": (WIDTH, PATCH),
    "all_final_layer.2-1.adaLN_modulation.1": (TIME, WIDTH),
}
MODULES = {f"{b}.{name}": size for b, own in BLOCKS.items() for name, size in own.items()} | OUTSIDE
"""Input and output widths of every linear of the small model, under diffusers' names."""


def draft(modules: Iterable[str], seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """Random pairs under diffusers' names, as ai-toolkit writes them for ComfyUI."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in modules:
        inputs, outputs = MODULES[name]
        stem = f"diffusion_model.{name}"
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        tensors[f"{stem}.lora_A.weight"] = down
        tensors[f"{stem}.lora_B.weight"] = 0.5 * torch.randn(outputs, rank, generator=generator)
    return tensors


def lycoris(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same under names without dots, with alphas."""
    renamed = {}
    for key, tensor in tensors.items():
        stem, _, half = key.removeprefix("diffusion_model.").rpartition(".lora_")
        stem = "lycoris_" + stem.replace(".", "_")
        renamed[f"{stem}.lora_{'down' if half.startswith('A') else 'up'}.weight"] = tensor
        renamed[f"{stem}.alpha"] = torch.tensor(2.0)
    return renamed


def original(seed: int) -> dict[str, torch.Tensor]:
    """Pairs under the names of ComfyUI's own modules, query, key and value in one."""
    generator = torch.Generator().manual_seed(seed)
    own = {"attention.qkv": (WIDTH, 3 * WIDTH), "attention.out": (WIDTH, WIDTH)}
    own |= {f"feed_forward.w{number}": BLOCK[f"feed_forward.w{number}"] for number in (1, 2, 3)}
    sizes = {f"{block}.{name}": size for block in BLOCKS for name, size in own.items()}
    sizes |= {"x_embedder": (PATCH, WIDTH), "final_layer.linear": (WIDTH, PATCH)}
    tensors = {}
    for name, (inputs, outputs) in sizes.items():
        stem = "lora_unet_" + name.replace(".", "_")
        down = torch.randn(4, inputs, generator=generator) / inputs**0.5
        tensors[f"{stem}.lora_down.weight"] = down
        up = 0.5 * torch.randn(outputs, 4, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = up
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    return tensors


SPELLINGS = {
    "diffusers": lambda: draft(MODULES, 1),
    "lycoris": lambda: lycoris(draft(MODULES, 1)),
    "ComfyUI": lambda: original(1),
}


class Loads:
    """Runs the loaders of ours and of ComfyUI on MODELs, without a graph."""

    def __init__(self, host: Any, nodes: Any) -> None:
        self._host, self._nodes = host, nodes

    def put(self, name: str, tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, str(self._host.loras / name))
        return name

    def ours(self, model, name=A, strength=1.0, **control):
        node = self._nodes["QwenLoraLoader"]()
        with torch.inference_mode():
            return node.load(model, lora_name=name, strength=strength, **control)["result"][0]

    def stock(self, model, name=A, strength=1.0):
        node = self._nodes["LoraLoaderModelOnly"]()
        with torch.inference_mode():
            return node.load_lora_model_only(model, name, strength)[0]


@pytest.fixture
def loads(host, pack):
    import nodes

    yield Loads(host, nodes.NODE_CLASS_MAPPINGS)
    for path in host.loras.iterdir():
        path.unlink()


@pytest.fixture(scope="module")
def untouched(z_image):
    """The small model as it was made; no test loads it."""
    return z_image.small_z_image()


@pytest.fixture(scope="module")
def made(untouched, z_image, nunchaku_z_image):
    """Makes the emulated model of the same weights; splitting weights is done once."""
    models = {}

    def make(*, dense_refiners=False):
        if dense_refiners not in models:
            models[dense_refiners] = nunchaku_z_image.emulated_z_image(
                untouched, dense_refiners=dense_refiners
            )
        return anew(models[dense_refiners])

    return make


def anew(patcher):
    """A model of its own, as if loaded again."""
    return type(patcher)(copy.deepcopy(patcher.model), patcher.load_device, patcher.offload_device)


@pytest.fixture
def dense(graph, untouched):
    return anew(untouched)


@pytest.fixture
def emulated(graph, made):
    return made()


def packed_factors(model):
    """The low-rank factors of a model's packed layers, by name."""
    return {n: own for n, own in model.model.named_parameters() if ".proj_" in n}


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# ---- the emulated model ----


@pytest.mark.parametrize("dense_refiners", [False, True])
def test_the_emulated_model_computes_what_the_dense_one_does(dense, z_image, made, dense_refiners):
    emulated = made(dense_refiners=dense_refiners)
    packed = [m for m in emulated.model.modules() if isinstance(m, SVDQW4A4Linear)]
    assert len(packed) == 4 * (2 if dense_refiners else 4)
    for batch in (1, 2):
        expected = z_image.forward(dense, batch=batch)
        assert error(z_image.forward(emulated, batch=batch), expected) < EXACT
    hooked = [m for m in emulated.model.diffusion_model.layers.modules() if m._forward_pre_hooks]
    assert hooked == []


def test_the_emulated_patcher_joins_comfyuis_patches_with_packed_layers(
    dense, emulated, loads, z_image
):
    """And puts the base back: the same objects."""
    loads.put(A, SPELLINGS["diffusers"]())
    factors = packed_factors(emulated)
    base = z_image.ksample(emulated)
    stock = loads.stock(emulated, strength=0.7)
    expected = z_image.ksample(loads.stock(dense, strength=0.7))
    assert error(expected, base) > 0.05
    assert error(z_image.ksample(stock), expected) < EXACT
    assert torch.equal(z_image.ksample(emulated), base)
    after = packed_factors(emulated)
    assert all(after[name] is parameter for name, parameter in factors.items())


# ---- our nodes against ComfyUI's own merge ----


@pytest.mark.parametrize("dense_refiners", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lora_equals_comfyuis_own_merge(dense, loads, z_image, made, spelling, dense_refiners):
    emulated = made(dense_refiners=dense_refiners)
    loads.put(A, SPELLINGS[spelling]())
    base = z_image.ksample(dense)
    expected = z_image.ksample(loads.stock(dense, strength=0.7)) - base
    found = z_image.ksample(loads.ours(emulated, strength=0.7)) - z_image.ksample(emulated)
    assert expected.norm() > 0.05 * base.norm()
    assert error(found, expected) < DELTA


def test_every_module_alone_equals_comfyuis_own_merge(dense, emulated, loads, z_image):
    base, bare = z_image.ksample(dense, steps=1), z_image.ksample(emulated, steps=1)
    for name in (name for name in MODULES if not name.startswith("layers.1.")):
        loads.put(A, draft([name], 3, rank=8))
        expected = z_image.ksample(loads.stock(dense, strength=-1.5), steps=1) - base
        found = z_image.ksample(loads.ours(emulated, strength=-1.5), steps=1) - bare
        assert expected.norm() > 1e-4 * base.norm(), name
        assert error(found, expected) < 5 * DELTA, name


def test_in_bfloat16_the_error_is_that_of_comfyuis_own_merge(
    graph, loads, z_image, nunchaku_z_image
):
    half = z_image.small_z_image(dtype=torch.bfloat16)
    whole = z_image.small_z_image()
    whole.model.diffusion_model.load_state_dict(half.model.diffusion_model.state_dict())
    emulated = nunchaku_z_image.emulated_z_image(half)
    loads.put(A, SPELLINGS["diffusers"]())
    truth = z_image.ksample(loads.stock(whole, strength=0.7), steps=1)
    host = z_image.ksample(loads.stock(half, strength=0.7), steps=1)
    ours = z_image.ksample(loads.ours(emulated, strength=0.7), steps=1)
    assert error(ours, truth) < OVER_HOST * error(host, truth) < 0.1


# ---- branches ----


@pytest.fixture
def two(loads):
    """Two LoRAs: one of every module, one of some."""
    some = [name for name in MODULES if "to_k" in name or "w3" in name or "embedder" in name]
    return loads.put(A, draft(MODULES, 1)), loads.put(B, draft(some, 2, rank=24))


def test_branches_and_the_base_over_one_model(graph, loads, two, z_image, made):
    def stacks(model):
        return [
            model,
            loads.ours(model, A, 0.7),
            loads.ours(model, B),
            loads.ours(loads.ours(model, A), B, -0.5),
        ]

    expected = [z_image.ksample(stacks(made())[index]) for index in range(4)]
    assert len({latent.sum().item() for latent in expected}) == 4
    branches = stacks(made())
    for index in (1, 2, 0, 3, 3, 1, 0):
        assert torch.equal(z_image.ksample(branches[index]), expected[index])


def test_strengths_change_and_a_lora_that_is_unplugged_is_gone(emulated, loads, two, z_image):
    names = [name for name, _ in emulated.model.named_parameters()]
    base = z_image.ksample(emulated)
    before = {name: tensor.clone() for name, tensor in emulated.model.state_dict().items()}
    weak = z_image.ksample(loads.ours(emulated, A, 0.25))
    strong = z_image.ksample(loads.ours(emulated, A))
    assert (weak - base).norm() < (strong - base).norm()
    assert torch.equal(z_image.ksample(loads.ours(emulated, A, 0.25)), weak)
    assert torch.equal(z_image.ksample(emulated), base)
    after = emulated.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [name for name, _ in emulated.model.named_parameters()] == names


def test_a_saved_workflow_samples(graph, dense, emulated, loads, two, z_image):
    node = graph.node
    rows = {"lora_name_1": A, "lora_strength_1": 0.7, "lora_name_2": B, "enabled_2": False}
    prompt = {
        "model": graph.source(emulated),
        "clip": graph.source(object()),
        "positive": graph.source(z_image.conditioning(1)),
        "negative": graph.source(z_image.conditioning(2)),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "lora": node(
            "NunchakuZImageTurboLoraStackV4",
            model=["model", 0],
            clip=["clip", 0],
            lora_count=2,
            toggle_all=True,
            **rows,
        ),
        "sampler": node(
            "KSampler",
            model=["lora", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=0,
            steps=2,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "report": graph.sink("report", ["lora", 2]),
        "out": graph.sink("out", ["sampler", 0]),
    }
    done = graph.run(prompt)
    assert done.success, done.error
    assert done.values["report"].startswith("1 LoRA on ")
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    expected = z_image.ksample(loads.stock(dense, strength=0.7), latent=latent, cfg=2.0)
    assert error(done.values["out"]["samples"], expected) < EXACT


# ---- beside ComfyUI's own LoRA nodes ----


@pytest.fixture
def both(dense, loads, two, z_image):
    """What a model with both LoRAs computes: A of ComfyUI's nodes at 0.7, B of ours."""
    return z_image.ksample(loads.stock(loads.stock(dense, A, 0.7), B))


@pytest.mark.parametrize("stock_first", [True, False])
def test_chained_with_comfyuis_loader_both_take_effect(
    dense, emulated, loads, two, both, z_image, stock_first
):
    base = z_image.ksample(emulated)
    factors = dict(emulated.model.diffusion_model.named_parameters())
    if stock_first:
        chain = loads.ours(loads.stock(emulated, A, 0.7), B)
    else:
        chain = loads.stock(loads.ours(emulated, B), A, 0.7)
    stock = loads.stock(emulated, A, 0.7)
    alone = [z_image.ksample(loads.stock(dense, A, 0.7)), z_image.ksample(loads.stock(dense, B))]
    models = [(chain, both), (stock, alone[0]), (loads.ours(emulated, B), alone[1])]
    for index in (0, 0, 1, 2, 1, 0, 2, 0):
        model, expected = models[index]
        assert error(z_image.ksample(model), expected) < EXACT
    assert torch.equal(z_image.ksample(emulated), base)
    after = dict(emulated.model.diffusion_model.named_parameters())
    assert all(torch.equal(after[name], own) for name, own in factors.items())


def test_nothing_stays_composed_between_runs(emulated, loads, two, z_image, monkeypatch):
    """Where our node goes and ComfyUI's comes, nobody tells: its patches must meet the base."""
    transformer = emulated.model.diffusion_model
    base = z_image.ksample(emulated)
    expected = z_image.ksample(loads.stock(emulated, A))
    z_image.ksample(emulated)
    model = loads.ours(emulated, B)
    z_image.ksample(model)
    assert read_state(transformer) is EMPTY
    with monkeypatch.context() as patch:
        patch.setattr("latent_preview.prepare_callback", _stopping)
        with pytest.raises(KeyboardInterrupt):
            z_image.ksample(model)
    assert read_state(transformer) is EMPTY
    del model
    gc.collect()
    assert torch.equal(z_image.ksample(loads.stock(emulated, A)), expected)
    assert torch.equal(z_image.ksample(emulated), base)


def test_a_schedule_leaves_nothing_composed_between_runs(emulated, loads, two, z_image, composed):
    transformer = emulated.model.diffusion_model
    base, whole = z_image.ksample(emulated), z_image.ksample(loads.ours(emulated, A))
    expected = z_image.ksample(loads.stock(emulated, A))
    z_image.ksample(emulated)
    control = {"schedule_mode": "steps", "blocks": "custom", "custom_blocks": "rest:1"}
    model = loads.ours(emulated, A, schedule="0:1, 0.7:0.25", **control)
    composed.clear()
    found = z_image.ksample(model, steps=4)
    assert [[spec.strength for spec in wanted.specs] for wanted in composed] == [[1.0], [0.25], []]
    assert read_state(transformer) is EMPTY
    assert not torch.equal(found, whole)
    assert torch.equal(z_image.ksample(model, steps=4), found)
    del model
    gc.collect()
    assert torch.equal(z_image.ksample(loads.stock(emulated, A)), expected)
    assert torch.equal(z_image.ksample(emulated), base)


def test_a_run_composes_once_whatever_its_steps(emulated, loads, two, z_image, composed):
    model = loads.ours(emulated, A)
    for steps in (1, 4):
        composed.clear()
        z_image.ksample(model, steps=steps, cfg=2.0)
        assert [len(wanted.specs) for wanted in composed] == [1, 0]


def test_a_run_is_left_by_its_end_alone(emulated, loads, two, z_image, monkeypatch):
    """ComfyUI also ejects what it injected, for hooks that it takes out: that is its own matter."""
    from comfy.model_patcher import ModelPatcher

    monkeypatch.setattr(ModelPatcher, "clean_hooks", lambda self: None)
    model = loads.ours(emulated, A)
    z_image.ksample(model)
    assert read_state(emulated.model.diffusion_model) is EMPTY
    del model  # ComfyUI ejects what is let go


def test_a_clone_that_is_let_go_leaves_the_run_of_another_alone(
    emulated, loads, two, z_image, composed, monkeypatch
):
    expected = z_image.ksample(loads.ours(emulated, B))
    other = loads.ours(emulated, A)
    z_image.ksample(other)
    # It says that it is injected, as what it is a clone of was: ComfyUI copies that.
    held = [other.clone()]
    model = loads.ours(emulated, B)
    composed.clear()

    def letting_go(*_, **__):
        return lambda *_: held.clear()

    monkeypatch.setattr("latent_preview.prepare_callback", letting_go)
    assert torch.equal(z_image.ksample(model), expected)
    assert len(composed) == 2


def _stopping(*_, **__):
    def after_step(*_):
        raise KeyboardInterrupt

    return after_step


def test_room_is_made_of_the_model_within_a_run(emulated, loads, two, z_image, monkeypatch):
    """The patcher puts its backup in place while ours is composed."""
    base = z_image.ksample(emulated)
    model = loads.ours(loads.stock(emulated, A, 0.7), B)
    expected = z_image.ksample(model)
    alone = z_image.ksample(loads.ours(emulated, B))
    seen = []

    def unloading(*_, **__):
        def after_step(*_):
            seen.append(qwenlora.applied(emulated.model.diffusion_model).slots)
            model.partially_unload(model.offload_device, 1)
            assert read_state(emulated.model.diffusion_model) is EMPTY

        return after_step

    with monkeypatch.context() as patch:
        patch.setattr("latent_preview.prepare_callback", unloading)
        z_image.ksample(model)
    assert len(seen) == 2
    model.unpatch_model(model.offload_device)
    assert torch.equal(z_image.ksample(model), expected)
    assert torch.equal(z_image.ksample(loads.ours(emulated, B)), alone)
    assert torch.equal(z_image.ksample(emulated), base)


def test_the_report_says_that_comfyuis_patches_are_there(emulated, loads, two, caplog):
    import nodes

    stock = loads.stock(emulated, A)
    loaded = nodes.NODE_CLASS_MAPPINGS["QwenLoraLoader"]().load(stock, lora_name=B)
    report = loaded["result"][1]
    assert "its loader joins them with the quantized layers" in report.splitlines()[-1]
    assert not [record for record in caplog.records if record.name == "qwenlora"]


@pytest.fixture
def enabled(emulated, pack):
    return _enable(emulated)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_enabled_all_goes_through_our_engine(dense, emulated, enabled, loads, z_image, spelling):
    loads.put(A, SPELLINGS[spelling]())
    base = z_image.ksample(emulated)
    assert torch.equal(z_image.ksample(enabled), base)
    stock = loads.stock(enabled, A, 0.7)
    assert stock.patches == {}
    found, expected = z_image.ksample(stock), z_image.ksample(loads.stock(dense, A, 0.7))
    assert error(expected, base) > 0.05
    assert error(found, expected) < EXACT
    assert torch.equal(z_image.ksample(loads.ours(emulated, A, 0.7)), found)
    assert torch.equal(z_image.ksample(emulated), base)
    assert read_state(emulated.model.diffusion_model) is EMPTY


def kron(modules, seed):
    """LoKrs, which the loader's own patcher does not take."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in modules:
        inputs, outputs = MODULES[name]
        tensors[f"diffusion_model.{name}.lokr_w1"] = 0.2 * torch.randn(4, 4, generator=generator)
        small = torch.randn(outputs // 4, inputs // 4, generator=generator)
        tensors[f"diffusion_model.{name}.lokr_w2"] = 0.05 * small
    return tensors


def test_enabled_takes_more_than_pairs(dense, emulated, enabled, loads, z_image):
    loads.put(A, kron(["layers.0.attention.to_out.0", "layers.1.adaLN_modulation.0"], 4))
    base = z_image.ksample(emulated)
    found = z_image.ksample(loads.stock(enabled, A, 0.7))
    assert error(found, base) > 1e-3
    assert error(found, z_image.ksample(loads.stock(dense, A, 0.7))) < EXACT


def hooked(z_image, seed, name, strength):
    import nodes

    create = nodes.NODE_CLASS_MAPPINGS["CreateHookLora"]()
    (hooks,) = create.create_hook(name, strength, 1.0)
    return [[cond, {**own, "hooks": hooks}] for cond, own in z_image.conditioning(seed)]


@pytest.mark.parametrize("loader", ["none", "behind", "before"])
def test_enabled_lora_hooks_work(
    dense, emulated, enabled, loads, two, z_image, loader, composed, caplog
):
    base = z_image.ksample(emulated)
    models = [enabled, dense]
    if loader == "behind":
        models = [loads.stock(model, B, 0.6) for model in models]
    elif loader == "before":
        # The loader's own patcher joins these with the layers, and ours come on top.
        early = loads.stock(emulated, B, 0.6)
        models = [_enable(early), loads.stock(dense, B, 0.6)]
    conds = {
        "positive": hooked(z_image, 1, A, 0.8),
        "negative": hooked(z_image, 2, B, -0.5),
        "cfg": 2.0,
    }
    found, expected = (z_image.ksample(model, **conds) for model in models)
    assert error(found, base) > 0.05
    assert error(found, expected) < EXACT
    assert read_state(emulated.model.diffusion_model) is EMPTY
    assert torch.equal(z_image.ksample(emulated), base)


def _enable(model):
    import nodes

    return nodes.NODE_CLASS_MAPPINGS["QwenLoraEnable"]().enable(model)["result"][0]


def test_a_text_encoders_hook_is_not_warned_of(emulated, loads, two, z_image, caplog):
    import nodes

    stem = "text_encoders.qwen3_4b.transformer.model.layers.0."
    names = [f"{stem}self_attn.q_proj.lora_{half}.weight" for half in "AB"]
    loads.put("text.safetensors", {name: torch.ones(4, 4) for name in names})
    hooks = nodes.NODE_CLASS_MAPPINGS["CreateHookLora"]().create_hook("text.safetensors", 1.0, 1.0)
    hooked = [[cond, {"hooks": hooks[0]}] for cond, _ in z_image.conditioning(1)]
    z_image.ksample(loads.ours(emulated, B), positive=hooked)
    assert not [r for r in caplog.records if r.name == "qwenlora"]


def test_a_dense_model_is_named(dense, loads, two):
    with pytest.raises(qwenlora.QwenLoraError, match=r"got NextDiT\nhint: .*Z-Image DiT Loader"):
        loads.ours(dense)


def test_offload_that_the_model_has_not_is_said(emulated, loads, two, z_image, caplog):
    import nodes

    node = nodes.NODE_CLASS_MAPPINGS["NunchakuZImageTurboLoraStackV3"]()
    model, _ = node.load(emulated, lora_name_1=A, cpu_offload="enable")["result"]
    assert "`cpu_offload` is ignored" in caplog.text
    assert torch.equal(z_image.ksample(model), z_image.ksample(loads.ours(emulated, A)))


def test_memory_is_announced_by_the_clone_only(emulated, loads, two, z_image):
    size = emulated.model_size()
    model = loads.ours(emulated, A)
    z_image.ksample(model)
    assert model.model_size() > size == emulated.model_size()
