"""On a CUDA device: the same tensors as on the CPU, and layers of real size on Nunchaku's kernels.

The first part needs a device only. The second also needs Nunchaku itself, built for that device.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qwenlora
from qwenlora import emulation
from qwenlora.packing import pack

pytestmark = pytest.mark.gpu

WIDTH, MLP, MOD = 3072, 12288, 18432
BOUND = 0.01
"""bf16 rounding of a layer's output, relative to a delta of the same size (measured: 0.003)."""


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def record(name: str, **figures: float) -> None:
    """Append figures to the file named by QWENLORA_TEST_FIGURES, for docs/correctness.md."""
    path = os.environ.get("QWENLORA_TEST_FIGURES")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: figures}) + "\n")


class Pair(NamedTuple):
    """One module's delta as a file holds it: (r, in), (out, r) and its factor."""

    down: Tensor
    up: Tensor
    scale: float

    def apply(self, x: Tensor) -> Tensor:
        down, up = self.down.to(x.device).double(), self.up.to(x.device).double()
        return self.scale * (x.double() @ down.mT @ up.mT)


def random_pair(out: int, inp: int, rank: int, seed: int, *, scale: float = 0.5) -> Pair:
    """A delta whose output is about as large as a layer's: rounding then measures against it."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inp, generator=generator) / math.sqrt(inp)
    # net.2 sees the output of a GELU, mostly near zero.
    gain = 16 if inp == MLP else 4
    up = torch.randn(out, rank, generator=generator) * gain / math.sqrt(rank)
    return Pair(down.bfloat16(), up.bfloat16(), scale)


def write(path: Path, pairs: dict[str, Pair]) -> Path:
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{name}.lora_down.weight"] = pair.down
        tensors[f"{name}.lora_up.weight"] = pair.up
        tensors[f"{name}.alpha"] = torch.tensor(pair.scale * pair.down.shape[0])
    save_file(tensors, path)
    return path


class TestSameTensorsEverywhere:
    """The emulated model on both devices."""

    CONFIG = emulation.EmulatedConfig(
        num_layers=3,
        heads=4,
        head_dim=64,
        axes_dims_rope=(16, 24, 24),
        joint_attention_dim=128,
        precision=emulation.Precision.W4A4,
        dtype=torch.bfloat16,
    )

    @pytest.fixture
    def loras(self, tmp_path: Path) -> list[tuple[Path, float]]:
        width = self.CONFIG.channels
        shapes = {"attn.to_q": (width, width), "attn.to_v": (width, width)}
        shapes |= {"img_mlp.net.0.proj": (4 * width, width), "img_mod.1": (6 * width, width)}
        files = []
        for index, rank in enumerate((8, 20, 64)):
            pairs = {
                f"transformer_blocks.{block}.{name}": random_pair(*shape, rank, 100 * index + block)
                for block in range(3)
                for name, shape in shapes.items()
            }
            pairs["proj_out"] = random_pair(64, width, rank, 7 + index)
            files.append((write(tmp_path / f"{index}.safetensors", pairs), 0.3 * index - 0.4))
        return files

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        found = dict(model.named_parameters()) | dict(model.named_buffers())
        return {name: tensor.detach().cpu() for name, tensor in found.items()}

    @pytest.mark.parametrize("placement", list(qwenlora.Placement))
    def test_bit_identical_to_the_cpu(self, loras: Any, placement: qwenlora.Placement) -> None:
        options = qwenlora.ComposeOptions(placement=placement)
        on_cpu = emulation.random_transformer(self.CONFIG, seed=3)
        on_gpu = emulation.random_transformer(self.CONFIG, seed=3).to("cuda")
        base = self.tensors(on_gpu)
        qwenlora.compose_loras(on_cpu, loras)
        report = qwenlora.compose_loras(on_gpu, loras, options=options)
        assert report.complete
        expected, found = self.tensors(on_cpu), self.tensors(on_gpu)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        qwenlora.reset_loras(on_gpu)
        after = self.tensors(on_gpu)
        assert base.keys() == after.keys()
        assert all(torch.equal(base[name], after[name]) for name in base)

    def test_compressed_within_a_bound_of_the_cpu(self, loras: Any) -> None:
        deltas = {}
        for device in ("cpu", "cuda"):
            model = emulation.random_transformer(self.CONFIG, seed=3).to(device)
            report = qwenlora.compose_loras(model, loras, max_rank=48)
            layer: Any = model.get_submodule("transformer_blocks.1.img_mlp.net.0.proj")
            down = pack.unpack_lowrank(layer.proj_down, pack.LowRankSide.DOWN)[32:].double()
            up = pack.unpack_lowrank(layer.proj_up, pack.LowRankSide.UP)[:, 32:].double()
            deltas[device] = (up @ down).cpu()
            assert 0 < report.energy_lost < 1
        error = relative(deltas["cuda"], deltas["cpu"])
        record("compressed, GPU against CPU", delta=error)
        assert error < BOUND

    def test_memory_is_given_back(self, loras: Any) -> None:
        model = emulation.random_transformer(self.CONFIG, seed=3).to("cuda")
        qwenlora.compose_loras(model, loras)
        qwenlora.reset_loras(model)
        qwenlora.clear_cache()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(20):
            qwenlora.compose_loras(model, loras)
            qwenlora.compose_loras(model, loras[:1])
            qwenlora.reset_loras(model)
        qwenlora.clear_cache()
        assert torch.cuda.memory_allocated() <= before


def nunchaku_module(name: str) -> Any:
    """A module of Nunchaku, or a skip that says what is missing."""
    try:
        importlib.import_module("nunchaku._C")
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"needs Nunchaku with its kernels (the PyPI package is another one): {error}")


class Block(nn.Module):
    """The quantized layers of one Qwen-Image block at real size, under their real paths."""

    def __init__(self) -> None:
        super().__init__()
        linear = nunchaku_module("nunchaku.models.linear")

        def svdq(inp: int, out: int, **settings: Any) -> nn.Module:
            layer = linear.SVDQW4A4Linear(inp, out, rank=32, device="cuda", **settings)
            return fill_svdq(layer)

        self.attn = nn.Module()
        self.attn.to_qkv = svdq(WIDTH, 3 * WIDTH)
        self.attn.add_qkv_proj = svdq(WIDTH, 3 * WIDTH)
        self.attn.to_out = nn.ModuleList([svdq(WIDTH, WIDTH)])
        self.attn.to_add_out = svdq(WIDTH, WIDTH)
        for stream in ("img", "txt"):
            first = nn.Module()
            first.proj = svdq(WIDTH, MLP)
            mlp = nn.Module()
            mlp.net = nn.ModuleList([first, nn.Identity(), svdq(MLP, WIDTH, act_unsigned=True)])
            setattr(self, f"{stream}_mlp", mlp)
            awq = linear.AWQW4A16Linear(WIDTH, MOD, device="cuda", torch_dtype=torch.bfloat16)
            setattr(self, f"{stream}_mod", nn.Sequential(nn.SiLU(), fill_awq(awq)))


def fill_svdq(layer: Any) -> nn.Module:
    """Random values in the real layouts."""
    generator = torch.Generator(device="cuda").manual_seed(layer.in_features + layer.out_features)
    inp, out = layer.in_features, layer.out_features

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    values = torch.randint(-8, 8, (out, inp), device="cuda", generator=generator, dtype=torch.int8)
    scales = (0.5 + normal(out, inp // 64).abs()) / (5 * math.sqrt(inp))
    layer.qweight.data = pack.pack_svdq_qweight(values)
    layer.wscales.data = pack.pack_svdq_wscales(scales.bfloat16())
    layer.bias.data = pack.pack_vector((0.1 * normal(out)).bfloat16())
    layer.smooth_factor.data = pack.pack_vector(torch.exp(0.4 * normal(inp)).bfloat16())
    layer.smooth_factor_orig.data = layer.smooth_factor.data.clone()
    down = (normal(32, inp) / math.sqrt(inp)).bfloat16()
    up = (normal(out, 32) / 6).bfloat16()
    layer.proj_down.data = pack.pack_lowrank(down, pack.LowRankSide.DOWN)
    layer.proj_up.data = pack.pack_lowrank(up, pack.LowRankSide.UP)
    return layer  # type: ignore[no-any-return]


def fill_awq(layer: Any) -> nn.Module:
    generator = torch.Generator(device="cuda").manual_seed(5)
    shape = (layer.out_features, layer.in_features)
    values = torch.randint(0, 16, shape, device="cuda", generator=generator, dtype=torch.uint8)
    scales = torch.full((WIDTH // 64, layer.out_features), 1 / (5 * math.sqrt(WIDTH)))
    layer.qweight.data = pack.pack_awq_qweight(values)
    layer.wscales.data = scales.bfloat16().cuda()
    layer.wzeros.data = (-7.5 * scales).bfloat16().cuda()
    layer.bias.data = torch.zeros(layer.out_features, dtype=torch.bfloat16, device="cuda")
    return layer  # type: ignore[no-any-return]


class Kernels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block()])
        self.img_in = nn.Linear(64, WIDTH, device="cuda", dtype=torch.bfloat16)


PREFIX = "transformer_blocks.0"
MODULES = {
    "attn.to_q": (WIDTH, WIDTH, 16),
    "attn.to_k": (WIDTH, WIDTH, 24),
    "attn.to_v": (WIDTH, WIDTH, 64),
    "attn.add_q_proj": (WIDTH, WIDTH, 32),
    "attn.add_v_proj": (WIDTH, WIDTH, 20),
    "attn.to_out.0": (WIDTH, WIDTH, 128),
    "attn.to_add_out": (WIDTH, WIDTH, 8),
    "img_mlp.net.0.proj": (MLP, WIDTH, 64),
    "img_mlp.net.2": (WIDTH, MLP, 48),
    "txt_mlp.net.0.proj": (MLP, WIDTH, 12),
    "txt_mlp.net.2": (WIDTH, MLP, 16),
    "img_mod.1": (MOD, WIDTH, 32),
    "txt_mod.1": (MOD, WIDTH, 16),
}


@pytest.fixture(scope="module")
def model() -> Any:
    # As a host does: nodes run in inference mode, so a loaded model's tensors are of that mode.
    with torch.inference_mode():
        return Kernels()


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    return {
        name: random_pair(out, inp, rank, seed)
        for seed, (name, (out, inp, rank)) in enumerate(MODULES.items())
    }


@pytest.fixture(scope="module")
def file(pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loras") / "all.safetensors"
    return write(path, {f"{PREFIX}.{name}": pair for name, pair in pairs.items()})


class TestKernels:
    """Layers of real size, run by Nunchaku's own Python and kernels."""

    @pytest.fixture(autouse=True)
    def _inference(self, model: Any) -> Any:
        with torch.inference_mode():
            yield
        qwenlora.reset_loras(model)

    def x(self, features: int, rows: int = 512) -> Tensor:
        generator = torch.Generator(device="cuda").manual_seed(features)
        return torch.randn(1, rows, features, device="cuda", generator=generator).bfloat16()

    @pytest.mark.parametrize(
        ("slot", "parts"),
        [
            ("attn.to_qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
            ("attn.add_qkv_proj", ("attn.add_q_proj", None, "attn.add_v_proj")),
            ("attn.to_out.0", ("attn.to_out.0",)),
            ("attn.to_add_out", ("attn.to_add_out",)),
            ("img_mlp.net.0.proj", ("img_mlp.net.0.proj",)),
            ("txt_mlp.net.0.proj", ("txt_mlp.net.0.proj",)),
        ],
    )
    def test_svdq_slot_gains_the_lora_term(
        self,
        model: Any,
        pairs: dict[str, Pair],
        file: Path,
        slot: str,
        parts: tuple[str | None, ...],
    ) -> None:
        layer = model.get_submodule(f"{PREFIX}.{slot}")
        x, strength = self.x(layer.in_features), 0.7
        base = layer(x).clone()
        report = qwenlora.compose_loras(model, (file, strength))
        assert report.complete
        found = layer(x).double() - base.double()
        blank = torch.zeros(*x.shape[:-1], WIDTH, device="cuda", dtype=torch.float64)
        expected = torch.cat([pairs[p].apply(x) if p else blank for p in parts], dim=-1) * strength
        error = relative(found, expected)
        record(f"slot {slot}", delta=error)
        assert error < BOUND

    def test_fused_mlp_gains_both_terms(
        self, model: Any, pairs: dict[str, Pair], file: Path, tmp_path: Path
    ) -> None:
        fused = nunchaku_module("nunchaku.ops.fused").fused_gelu_mlp
        for stream in ("img", "txt"):
            first = model.get_submodule(f"{PREFIX}.{stream}_mlp.net.0.proj")
            second = model.get_submodule(f"{PREFIX}.{stream}_mlp.net.2")
            name = f"{stream}_mlp.net.0.proj"
            only_first = write(tmp_path / "fc1.safetensors", {f"{PREFIX}.{name}": pairs[name]})
            x = self.x(WIDTH)
            qwenlora.compose_loras(model, only_first)
            before = fused(x, first, second).clone()
            # net.2 sees the unshifted GELU of the composed first layer.
            hidden = nn.functional.gelu(first(x), approximate="tanh")
            qwenlora.compose_loras(model, file)
            found = fused(x, first, second).double() - before.double()
            error = relative(found, pairs[f"{stream}_mlp.net.2"].apply(hidden))
            record(f"fused mlp {stream}", delta=error)
            assert error < BOUND

    @pytest.mark.parametrize("stream", ["img", "txt"])
    def test_modulation_gains_the_term_in_its_row_order(
        self, model: Any, pairs: dict[str, Pair], file: Path, stream: str
    ) -> None:
        modulation = model.get_submodule(f"{PREFIX}.{stream}_mod")
        temb = self.x(WIDTH, rows=2)[0]
        base = modulation(temb).clone()
        qwenlora.compose_loras(model, file)
        raw = modulation(temb).double() - base.double()
        expected = pairs[f"{stream}_mod.1"].apply(nn.functional.silu(temb))
        error = relative(pack.deinterleave_modulation(raw, dim=1), expected)
        unpermuted = relative(raw, expected)
        record(f"modulation {stream}", delta=error, rows_not_permuted=unpermuted)
        assert error < BOUND
        assert unpermuted > 1

    def test_over_the_cap_is_compressed_not_garbage(self, model: Any, tmp_path: Path) -> None:
        name = "attn.to_out.0"
        stack, pairs = [], []
        for index in range(9):
            pair = random_pair(WIDTH, WIDTH, 128, 40 + index, scale=1.0)
            # Trained deltas have falling spectra; flat ones would lose more.
            fall = torch.logspace(0, -3, 128)
            pairs.append(Pair(pair.down, (pair.up.float() * fall).bfloat16(), 1.0))
            file = write(tmp_path / f"{index}.safetensors", {f"{PREFIX}.{name}": pairs[-1]})
            stack.append((file, 0.5))
        layer = model.get_submodule(f"{PREFIX}.{name}")
        x = self.x(WIDTH)
        base = layer(x).clone()
        report = qwenlora.compose_loras(model, stack)
        assert layer.proj_down.shape[1] == 1024
        found = layer(x).double() - base.double()
        expected = sum((pair.apply(x) for pair in pairs), torch.zeros_like(found)) * 0.5
        error = relative(found, expected)
        record("over the cap", delta=error, energy_lost=report.energy_lost)
        assert 0 < report.energy_lost < 1e-5
        assert error < BOUND

    def test_the_emulated_layer_is_the_kernels(self, model: Any) -> None:
        layer = model.get_submodule(f"{PREFIX}.attn.to_qkv")
        twin = emulation.SVDQW4A4Linear(
            WIDTH, 3 * WIDTH, rank=32, precision=emulation.Precision.W4A4, device="cuda"
        )
        twin.load_state_dict(layer.state_dict(), strict=False)
        x = self.x(WIDTH)
        error = relative(layer(x), twin(x))
        record("emulated W4A4 layer against the kernels", output=error)
        # The kernels add up groups of 64 in bfloat16, the emulation in float32.
        assert error < 0.02

    def test_reset_is_bit_exact(self, model: Any, file: Path) -> None:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert not any(tensor.isnan().any() for tensor in before.values())
        qwenlora.compose_loras(model, file)
        qwenlora.reset_loras(model)
        after = dict(model.named_parameters())
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
