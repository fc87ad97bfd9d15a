"""Where an attached pipeline's LoRAs come from, and how they are written again."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import QwenImagePipeline
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qwenlora
from qwenlora import errors

from .pipelines import (
    dense_transformer,
    emulated,
    picture,
    pipeline_of,
    relative_error,
    tensors,
    tiny_vae,
)

OUTPUT_BOUND = 1e-5
USUAL = "pytorch_lora_weights.safetensors"
A, B = tensors(1), tensors(2)


@pytest.fixture(scope="module")
def dense():
    return dense_transformer()


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture
def pipeline(dense, vae):
    return qwenlora.attach(pipeline_of(emulated(dense), vae))


@pytest.fixture
def with_peft(dense, vae):
    return pipeline_of(copy.deepcopy(dense), vae)


def loaded(pipeline, *args, **kwargs):
    """The picture with one LoRA alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(*args, **kwargs)
    found = picture(pipeline)
    pipeline.unload_lora_weights()
    return found


@pytest.fixture
def expected(pipeline):
    return loaded(pipeline, A)


def written(path, given=A, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone() for key, tensor in given.items()}, path, metadata=metadata)
    return path


# ---- local files ----


def test_a_file(pipeline, expected, tmp_path):
    file = written(tmp_path / "elk.safetensors")
    assert torch.equal(loaded(pipeline, file), expected)
    assert torch.equal(loaded(pipeline, str(file)), expected)
    # As in diffusers, a file is itself, whatever it is called.
    assert torch.equal(loaded(pipeline, file, weight_name="x.safetensors"), expected)


def test_a_folder(pipeline, expected, tmp_path, caplog):
    written(tmp_path / "fox.safetensors", B)
    written(tmp_path / "elk.safetensors")
    written(tmp_path / "deep" / "owl.safetensors", B)
    by_name = loaded(pipeline, tmp_path, weight_name="elk.safetensors")
    assert torch.equal(by_name, expected)
    other = loaded(pipeline, tmp_path, weight_name="owl.safetensors", subfolder="deep")
    assert torch.equal(other, loaded(pipeline, B))
    assert not caplog.records
    # Several, and no name: the first one, and a warning.
    assert torch.equal(loaded(pipeline, tmp_path), expected)
    assert "has 2 LoRA files: `elk.safetensors` is loaded" in caplog.text


def test_the_usual_name_goes_first(pipeline, expected, tmp_path):
    written(tmp_path / "a.safetensors", B)
    written(tmp_path / "scheduler.safetensors", B)
    written(tmp_path / USUAL)
    assert torch.equal(loaded(pipeline, tmp_path), expected)


@pytest.mark.parametrize("weight_name", [None, "adapter_model.safetensors"])
def test_a_folder_by_peft_with_its_scale(dense, pipeline, tmp_path, weight_name):
    """The alpha stands in `adapter_config.json` alone."""
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "net.2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = get_peft_model(copy.deepcopy(dense), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in oracle.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    oracle.save_pretrained(tmp_path)
    found = loaded(pipeline, tmp_path, weight_name=weight_name)
    assert relative_error(found, picture(pipeline_of(oracle.base_model.model, pipeline.vae))) < (
        OUTPUT_BOUND
    )
    pipeline.load_lora_weights(tmp_path, "elk")
    pipeline.save_lora_weights(tmp_path / "again", adapter_name="elk")
    pipeline.unload_lora_weights()
    assert torch.equal(loaded(pipeline, tmp_path / "again"), found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda f: f / "x.safetensors", {}, errors.LoraNotFoundError, "does not exist"),
        (lambda f: f, {}, errors.LoraNotFoundError, "has no safetensors file"),
        (lambda f: f, {"subfolder": "x"}, errors.LoraNotFoundError, "has no safetensors file"),
        (lambda f: f, {"weight_name": "x"}, errors.LoraNotFoundError, "has no file `x`"),
        (lambda f: "x.safetensors", {}, errors.LoraNotFoundError, "`x.safetensors` does not"),
        (lambda f: "c:/a/b", {}, errors.LoraNotFoundError, "`c:/a/b` does not exist"),
    ],
)
def test_what_is_not_there(pipeline, tmp_path, make, options, error, message):
    with pytest.raises(error, match=message):
        pipeline.load_lora_weights(make(tmp_path), **options)
    assert pipeline.get_list_adapters() == {}


def test_a_pickle_is_refused(pipeline, tmp_path):
    torch.save(A, tmp_path / "pytorch_lora_weights.bin")
    for source in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        with pytest.raises(errors.PickleFileError, match="hint:"):
            pipeline.load_lora_weights(source)


def test_a_file_that_changed_is_noticed(pipeline, expected, tmp_path):
    """It is planned when it is loaded, and read when it is composed."""
    file = written(tmp_path / "elk.safetensors")
    pipeline.load_lora_weights(file, "elk")
    written(file, tensors(3, rank=8))
    with pytest.raises(errors.LoraReadError, match="changed after it was planned"):
        picture(pipeline)
    pipeline.load_lora_weights(written(file), "elk", hotswap=True)
    assert torch.equal(picture(pipeline), expected)


def test_a_file_that_is_gone_is_noticed(pipeline, tmp_path):
    base = picture(pipeline)
    file = written(tmp_path / "elk.safetensors")
    pipeline.load_lora_weights(file, "elk")
    file.unlink()
    with pytest.raises(errors.LoraReadError):
        picture(pipeline)
    pipeline.unload_lora_weights()
    assert torch.equal(picture(pipeline), base)


# ---- the Hub, out of its local cache ----

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path):
    """A cache of `huggingface_hub` with one repository; nothing is asked over the network."""
    repository = tmp_path / "cache" / "models--someone--elks"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def cached(hub):
    return {"cache_dir": hub.parents[2], "local_files_only": True}


def test_a_name_on_the_hub(pipeline, expected, hub):
    written(hub / USUAL)
    written(hub / "deep" / "fox.safetensors", B)
    options = {**cached(hub), "weight_name": USUAL}
    assert torch.equal(loaded(pipeline, "someone/elks", **options), expected)
    inside = {**cached(hub), "weight_name": "fox.safetensors", "subfolder": "deep"}
    assert torch.equal(loaded(pipeline, "someone/elks", **inside), loaded(pipeline, B))


def test_a_name_on_the_hub_as_diffusers_finds_it(pipeline, with_peft, hub):
    written(hub / USUAL)
    options = {**cached(hub), "weight_name": USUAL}
    theirs = loaded(with_peft, "someone/elks", **options)
    assert relative_error(loaded(pipeline, "someone/elks", **options), theirs) < OUTPUT_BOUND


def test_peft_s_configuration_comes_with_its_file(pipeline, expected, hub):
    given = {key.replace("transformer.", "base_model.model.", 1): own for key, own in A.items()}
    written(hub / "adapter_model.safetensors", given)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["to_q"]}
    (hub / "adapter_config.json").write_text(json.dumps(config))
    options = {**cached(hub), "weight_name": "adapter_model.safetensors"}
    pipeline.load_lora_weights("someone/elks", "elk", **options)
    pipeline.set_adapters("elk", 0.5)
    assert torch.equal(picture(pipeline), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("someone/elks", {}, "pass weight_name"),
        ("someone/elks", {"weight_name": "x.safetensors"}, "has no `x.safetensors`"),
        ("someone/else", {"weight_name": USUAL}, f"has no `{USUAL}`"),
        ("-/-", {"weight_name": USUAL}, "the Hub says"),
    ],
)
def test_what_the_hub_has_not(pipeline, hub, name, options, message):
    written(hub / USUAL)
    with pytest.raises(errors.LoraReadError, match=message):
        pipeline.load_lora_weights(name, **cached(hub), **options)


# ---- saving ----


def test_a_file_is_saved_byte_for_byte(pipeline, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="qwenlora")
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4}), "title": "elk"}
    file = written(tmp_path / "elk.safetensors", metadata=metadata)
    pipeline.load_lora_weights(file, "elk")
    pipeline.set_adapters("elk", 0.3)
    pipeline.save_lora_weights(tmp_path / "out")
    assert (tmp_path / "out" / USUAL).read_bytes() == file.read_bytes()
    assert "`elk` saved in " in caplog.text
    pipeline.transformer.save_lora_adapter(tmp_path / "out", "elk", weight_name="x.safetensors")
    assert (tmp_path / "out" / "x.safetensors").read_bytes() == file.read_bytes()
    # Onto itself.
    pipeline.save_lora_weights(tmp_path, weight_name="elk.safetensors")
    assert load_file(file).keys() == A.keys()


def test_what_is_saved_is_what_peft_loads(pipeline, with_peft, tmp_path):
    pipeline.load_lora_weights(A, "elk")
    pipeline.load_lora_weights(B, "fox")
    pipeline.save_lora_weights(tmp_path, adapter_name="fox")
    assert relative_error(loaded(with_peft, tmp_path), loaded(pipeline, B)) < OUTPUT_BOUND
    with pytest.raises(errors.AdapterNameError):
        pipeline.save_lora_weights(tmp_path, adapter_name="elk")


def test_saved_in_float32(pipeline, tmp_path):
    half = {key: tensor.half() for key, tensor in A.items()}
    written(tmp_path / "elk.safetensors", half, metadata={"title": "elk"})
    pipeline.load_lora_weights(tmp_path / "elk.safetensors", "elk")
    pipeline.transformer.save_lora_adapter(tmp_path / "out", "elk", upcast_before_saving=True)
    found = load_file(tmp_path / "out" / USUAL)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[key], half[key].float()) for key in half)
    with safe_open(tmp_path / "out" / USUAL, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "title": "elk"}


@pytest.mark.parametrize("source", ["file", "state dict"])
def test_saved_by_a_function(pipeline, tmp_path, source):
    file = written(tmp_path / "elk.safetensors")
    pipeline.load_lora_weights(file if source == "file" else A)
    calls = []
    pipeline.save_lora_weights(tmp_path / "out", save_function=lambda *given: calls.append(given))
    ((found, path),) = calls
    assert path == (tmp_path / "out" / USUAL).as_posix()
    assert found.keys() == A.keys()
    assert all(torch.equal(found[key], A[key]) for key in A)
    pipeline.save_lora_weights(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_layers_that_are_given_go_to_the_class(pipeline, tmp_path):
    layers = {key.removeprefix("transformer."): tensor for key, tensor in A.items()}
    pipeline.save_lora_weights(tmp_path / "ours", transformer_lora_layers=dict(layers))
    QwenImagePipeline.save_lora_weights(tmp_path / "theirs", transformer_lora_layers=layers)
    assert (tmp_path / "ours" / USUAL).read_bytes() == (tmp_path / "theirs" / USUAL).read_bytes()


def test_what_cannot_be_saved(pipeline, tmp_path):
    file = written(tmp_path / "elk.safetensors")
    pipeline.load_lora_weights(file, "elk")
    with pytest.raises(errors.OutputError, match="is a file"):
        pipeline.save_lora_weights(file)
    with pytest.raises(errors.OutputError, match="cannot be written"):
        pipeline.save_lora_weights(file / "deeper")
    for options in ({"safe_serialization": False}, {"transformer_lora_adapter_metadata": {"r": 1}}):
        with pytest.raises(errors.UnsupportedAdapterError):
            pipeline.save_lora_weights(tmp_path / "out", **options)
    with pytest.raises(errors.UnsupportedAdapterError, match="no pickle is written"):
        pipeline.transformer.save_lora_adapter(tmp_path, "elk", safe_serialization=False)
    written(file, B)
    with pytest.raises(errors.LoraReadError, match="changed after it was planned"):
        pipeline.save_lora_weights(tmp_path / "out")
    shutil.rmtree(tmp_path)
    with pytest.raises(errors.LoraReadError):
        pipeline.save_lora_weights(tmp_path / "out")


@pytest.mark.slow
def test_diffusers_is_not_imported_for_it():
    program = (
        "import sys, qwenlora; qwenlora.attach;"
        " print(*{'diffusers', 'peft', 'huggingface_hub', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
