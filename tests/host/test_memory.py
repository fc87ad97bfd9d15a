"""Memory that a stack takes, against what its clone announced to the host before sampling."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qwenlora

PACK = Path(__file__).parents[2] / "comfy" / "qwenlora_nodes"
MIB = 1 << 20

_log = logging.getLogger(__name__)

TOLERANCE = 64 * MIB
"""What sampling may take beyond what was announced."""

REAL = {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
BLOCKS = 20
WIDTH = 3072
LINEARS = {
    **{f"attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"attn.add_{name}_proj": (WIDTH, WIDTH) for name in "qkv"},
    "attn.to_add_out": (WIDTH, WIDTH),
    **{f"{stream}_mlp.net.0.proj": (WIDTH, 4 * WIDTH) for stream in ("img", "txt")},
    **{f"{stream}_mlp.net.2": (4 * WIDTH, WIDTH) for stream in ("img", "txt")},
    **{f"{stream}_mod.1": (WIDTH, 6 * WIDTH) for stream in ("img", "txt")},
}


@pytest.fixture
def load(graph, host):
    """Run our loader node on a MODEL; the file is one that the host lists."""
    import nodes

    graph.load_pack(PACK)
    node = nodes.NODE_CLASS_MAPPINGS["QwenLoraLoader"]
    host.loras.mkdir(exist_ok=True)

    links = set()

    def run(model, path, strength=1.0):
        listed = host.loras / path.name
        if listed not in links:
            listed.hardlink_to(path)
            links.add(listed)
        return node().load(model, lora_name=path.name, strength=strength)["result"][0]

    yield run
    for link in links:
        link.unlink()


# ---- what is announced ----


@pytest.fixture
def two(Draft, tmp_path):
    return [
        Draft.full(seed, rank=16 * seed, blocks=2).save(tmp_path / f"{seed}.safetensors")
        for seed in (1, 2)
    ]


def announced(model, bare):
    """Bytes that a MODEL asks for beyond the bare model's, and those that its stack takes."""
    qwenlora.reset_loras(model.model.diffusion_model)
    wanted = model.model_options["transformer_options"]["qwenlora"]
    report = qwenlora.compose_loras(model.model.diffusion_model, list(wanted.specs))
    return model.model_size() - bare, report.added_bytes


@pytest.mark.parametrize("offload", [False, True])
def test_a_patcher_that_was_never_measured_over_a_composed_model(load, emulated_qwen, two, offload):
    transformer = emulated_qwen.model.diffusion_model
    bare = emulated_qwen.model_size()
    if offload:
        transformer.set_offload(True)
    qwenlora.compose_loras(transformer, two[1])
    unmeasured = type(emulated_qwen)(
        emulated_qwen.model, emulated_qwen.load_device, emulated_qwen.offload_device
    )
    assert unmeasured.size == 0
    model = load(unmeasured, two[0])
    asked, taken = announced(model, bare)
    assert asked == taken > 0
    # So that the branch without LoRAs does not announce them, either.
    assert unmeasured.model_size() == bare


def test_a_size_that_the_loader_set_is_kept(load, emulated_qwen, two):
    qwenlora.compose_loras(emulated_qwen.model.diffusion_model, two[1])
    emulated_qwen.size = 12_345_678
    model = load(emulated_qwen, two[0])
    asked, taken = announced(model, 12_345_678)
    assert asked == taken > 0
    assert emulated_qwen.size == 12_345_678


def test_each_clone_announces_its_own_stack(load, emulated_qwen, qwen, two):
    bare = emulated_qwen.model_size()
    one, other = (load(emulated_qwen, path) for path in two)
    both = load(one, two[1])
    qwen.ksample(both, steps=1)
    for model in (one, other, both, load(emulated_qwen, two[1])):
        asked, taken = announced(model, bare)
        assert asked == taken > 0


def test_nothing_is_kept_on_the_device_that_the_host_does_not_know_of(load, emulated_qwen, two):
    model = load(load(emulated_qwen, two[0]), two[1])
    wanted = model.model_options["transformer_options"]["qwenlora"]
    assert wanted.options.device_cache_bytes == 0


# ---- what is taken ----


@pytest.fixture(scope="module")
def real_size(host, qwen, nunchaku):
    """Blocks of real size, packed; the values of their weights do not matter to memory."""
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    from qwenlora.emulation import Precision

    def make():
        sizes = {**qwen.CONFIG, **REAL, "num_layers": BLOCKS}
        extra = {"scale_shift": 0, "rank": 32, "precision": Precision.W4A4}
        config = nunchaku.EmulatedConfig({**sizes, **extra})
        config.set_inference_dtype(torch.bfloat16, None)
        model = config.get_model({}, "")
        assert isinstance(model.diffusion_model, QwenImageTransformer2DModel)
        # The host's own layers are made without values.
        for name, parameter in model.diffusion_model.named_parameters():
            if parameter.ndim == 1:
                parameter.data.fill_(0 if name.endswith("bias") else 1)
            elif parameter.is_floating_point():
                parameter.data.normal_(0, 0.01)
        return nunchaku.EmulatedPatcher(model, **qwen.devices())

    return make


def write(path, rank):
    """A LoRA on every quantized linear of every block."""
    tensors = {}
    for block in range(BLOCKS):
        for name, (inp, out) in LINEARS.items():
            key = f"transformer_blocks.{block}.{name}"
            down = torch.empty(rank, inp, dtype=torch.bfloat16).normal_(0, 0.02)
            tensors[f"{key}.lora_A.weight"] = down
            tensors[f"{key}.lora_B.weight"] = torch.full((out, rank), 0.01, dtype=torch.bfloat16)
    save_file(tensors, str(path))
    return path


class Meter:
    """The free memory that the host reports, against that with the bare model alone loaded.

    A bare model takes more than its own size, since allocators round up: that is in no stack.
    """

    def __init__(self, model, ksample, *, composed) -> None:
        import comfy.model_management as management

        self._management = management
        self._device = management.get_torch_device()
        assert self._device.type == "cuda"
        self._size = model.model_size()
        # What libraries take at their first use stays: it is no model's, and no stack's, either.
        for run in (model, composed, model):
            management.unload_all_models()
            empty = self._free()
            assert ksample(run, steps=1).isfinite().all()
        self._bare = self._free()
        taken = empty - self._bare
        _log.info("bare: %.1f MiB, takes %.1f", self._size / MIB, taken / MIB)

    def _free(self) -> int:
        torch.cuda.synchronize()
        return int(self._management.get_free_memory(self._device))

    def check(self, model, name) -> None:
        """What is in use now is what the model announced, whoever asked for it before."""
        announced = model.model_size() - self._size
        beyond = self._bare - self._free() - announced
        figures = f"announced {announced / MIB:.1f} MiB, taken beyond that {beyond / MIB:.1f}"
        _log.info("%s: %s", name, figures)
        assert abs(beyond) <= TOLERANCE, f"{name}: {figures}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    return [write(folder / f"rank{rank}.safetensors", rank) for rank in (64, 32)]


@pytest.mark.gpu
class TestOnTheDevice:
    """A real patcher moves blocks of real size; the host's own figures are compared."""

    @pytest.fixture
    def model(self, cuda_host, real_size, graph):
        return real_size()

    @pytest.fixture
    def meter(self, model, qwen, files, load):
        return Meter(model, qwen.ksample, composed=load(model, files[1]))

    def test_one_stack_after_another_and_none(self, model, meter, files, load, qwen):
        first, second = (load(model, path) for path in files)
        assert first.model_size() - model.model_size() > 300 * MIB  # far more than the tolerance
        base = qwen.ksample(model, steps=1)
        for run, name in ((first, "first"), (second, "second"), (first, "first again")):
            assert not torch.equal(qwen.ksample(run, steps=1), base)
            meter.check(run, name)
        assert torch.equal(qwen.ksample(model, steps=1), base)
        meter.check(model, "reset")

    def test_two_at_once_into_an_empty_device(self, model, meter, files, load, qwen):
        import comfy.model_management

        comfy.model_management.unload_all_models()
        wanted = load(load(model, files[0]), files[1], -0.5)
        qwen.ksample(wanted, steps=1)
        meter.check(wanted, "two at once")

    def test_a_patcher_that_was_never_measured_over_a_composed_model(
        self, model, meter, files, load, qwen
    ):
        import comfy.model_management

        qwenlora.compose_loras(model.model.diffusion_model, files[0])
        comfy.model_management.unload_all_models()
        again = type(model)(model.model, model.load_device, model.offload_device)
        wanted = load(again, files[1])
        qwen.ksample(wanted, steps=1)
        meter.check(wanted, "never measured")
