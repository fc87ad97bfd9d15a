"""On a CUDA device: diffusers' own 4-bit layers over Nunchaku's kernels, a block of real size.

diffusers loads the same kernels from a server, and refuses this kind of device in Python alone.
Here its classes run over those of Nunchaku's extension, built for the device.
"""

from __future__ import annotations

import copy
import functools
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qwenlora
from qwenlora.emulation.lite_layers import layers_over

from .test_gpu import (
    BOUND,
    MLP,
    MODULES,
    PREFIX,
    WIDTH,
    Pair,
    fill_awq,
    fill_svdq,
    random_pair,
    record,
    relative,
)

pytestmark = pytest.mark.gpu

RANKS = {**MODULES, "attn.add_k_proj": (WIDTH, WIDTH, 16)}
SVDQ = [name for name in RANKS if "mod" not in name]
AWQ = [name for name in RANKS if "mod" in name]


@functools.cache
def operators(native: Any) -> SimpleNamespace:
    """Nunchaku's kernels as operators of PyTorch, as diffusers' package of kernels registers them.

    What a plain int4 layer does not use is left out.
    """

    @torch.library.custom_op("qwenlora_tests::quantize", mutates_args=("out", "scales", "act"))
    def quantize(
        x: Tensor, out: Tensor, scales: Tensor, down: Tensor, act: Tensor, smooth: Tensor
    ) -> None:
        native.quantize_w4a4_act_fuse_lora(x, out, scales, down, act, smooth, False, False)

    @torch.library.custom_op("qwenlora_tests::gemm", mutates_args=("out",))
    def gemm(
        act: Tensor,
        weight: Tensor,
        out: Tensor,
        act_scales: Tensor,
        weight_scales: Tensor,
        lora_act: Tensor,
        up: Tensor,
        bias: Tensor | None,
        lora_scales: list[float],
    ) -> None:
        none = [None] * 3
        native.gemm_w4a4(
            *(act, weight, out, None, act_scales, weight_scales, None, None, lora_act, up),
            *(None, None, *none, bias, *none, False, lora_scales, False, False, 1.0),
            *(None, *none, 0),
        )

    @torch.library.custom_op("qwenlora_tests::gemv", mutates_args=())
    def gemv(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        rows, inputs = x.shape
        return native.gemv_awq(x, weight, scales, zeros, rows, scales.shape[1], inputs, 64)

    @gemv.register_fake
    def _(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], scales.shape[1])

    def gemm_w4a4(*args: Any) -> None:
        assert args[4].dtype == torch.bfloat16
        # What the kernel itself asserts in debug builds alone.
        assert args[8].shape[1] == args[9].shape[1]
        assert len(args[20]) == -(-args[8].shape[1] // 16)
        gemm(*(args[at] for at in (0, 1, 2, 4, 5, 8, 9, 15, 20)))

    def quantized(
        x: Tensor, out: Tensor, scales: Tensor, down: Tensor, act: Tensor, *rest: Any
    ) -> None:
        assert act.shape[1] == down.shape[1]
        quantize(x, out, scales, down, act, rest[0])

    return SimpleNamespace(
        quantize_w4a4_act_fuse_lora=quantized,
        gemm_w4a4=gemm_w4a4,
        gemv_awq=lambda x, weight, scales, zeros, *sizes: gemv(x, weight, scales, zeros),
    )


@pytest.fixture(scope="module")
def layers() -> Any:
    pytest.importorskip("diffusers.quantizers.nunchaku", reason="needs diffusers 0.40")
    try:
        native = importlib.import_module("nunchaku._C").ops
    except ImportError as error:
        pytest.skip(f"needs Nunchaku's kernels (the PyPI package is another one): {error}")
    return layers_over(operators(native), name="nunchaku")


@pytest.fixture(scope="module")
def model(layers: Any) -> Any:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = QwenImageTransformer2DModel(num_layers=1).bfloat16().eval().requires_grad_(False)
    common = {"precision": "int4", "group_size": 64}
    config = {
        "svdq_w4a4": {**common, "rank": 32, "targets": [f"{PREFIX}.{name}" for name in SVDQ]},
        "awq_w4a16": {**common, "targets": [f"{PREFIX}.{name}" for name in AWQ]},
    }
    layers.replace_with_nunchaku_linear(model, config, torch.bfloat16)
    for name in SVDQ:
        layer = model.get_submodule(f"{PREFIX}.{name}").to_empty(device="cuda")
        layer.smooth_factor_orig = nn.Parameter(layer.smooth_factor.data, requires_grad=False)
        fill_svdq(layer)
        del layer.smooth_factor_orig
    for name in AWQ:
        fill_awq(model.get_submodule(f"{PREFIX}.{name}").to_empty(device="cuda"))
    return model


@pytest.fixture(autouse=True)
def _inference(model: Any) -> Any:
    with torch.inference_mode():
        yield
    qwenlora.reset_loras(model)


def _write(
    folder: Path, seed: int, ranks: dict[str, tuple[int, int, int]]
) -> tuple[Path, dict[str, Pair]]:
    pairs = {
        name: random_pair(out, inp, rank, seed + at, scale=0.5)
        for at, (name, (out, inp, rank)) in enumerate(ranks.items())
    }
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"transformer.{PREFIX}.{name}.lora_A.weight"] = pair.down
        tensors[f"transformer.{PREFIX}.{name}.lora_B.weight"] = pair.up
        tensors[f"transformer.{PREFIX}.{name}.alpha"] = torch.tensor(
            pair.scale * pair.down.shape[0]
        )
    path = folder / f"{seed}.safetensors"
    save_file(tensors, path)
    return path, pairs


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Pair]]:
    return _write(tmp_path_factory.mktemp("lite"), 0, RANKS)


def _x(features: int, rows: int) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(features)
    return torch.randn(1, rows, features, device="cuda", generator=generator).bfloat16()


@pytest.mark.parametrize("name", RANKS)
def test_each_linear_gains_its_delta(name: str, model: Any, lora: Any) -> None:
    file, pairs = lora
    layer = model.get_submodule(f"{PREFIX}.{name}")
    x = _x(layer.in_features, 2 if name in AWQ else 512)
    x = x[0] if name in AWQ else x
    base = layer(x).clone()
    report = qwenlora.compose_loras(model, (file, 0.7))
    assert report.complete
    if name in SVDQ:
        assert layer.rank == layer.proj_down.shape[1] > 32
    error = relative(layer(x).double() - base.double(), pairs[name].apply(x) * 0.7)
    record(f"diffusers' layer {name}", delta=error)
    assert error < BOUND


def test_a_rank_left_behind_would_lose_the_delta(model: Any, lora: Any) -> None:
    """The reason for moving the attribute: the kernel takes its loops' length from the buffer."""
    file, pairs = lora
    layer = model.get_submodule(f"{PREFIX}.attn.to_out.0")
    x = _x(WIDTH, 512)
    base = layer(x).clone()
    qwenlora.compose_loras(model, file)
    rank, layer.rank = layer.rank, 32
    try:
        with pytest.raises(AssertionError):
            layer(x)
    finally:
        layer.rank = rank
    assert relative(layer(x).double() - base.double(), pairs["attn.to_out.0"].apply(x)) < BOUND


def test_a_whole_lokr_in_the_mlp(model: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    name = "img_mlp.net.0.proj"
    w1 = torch.randn(64, 48, generator=generator) / 7
    w2 = torch.randn(MLP // 64, WIDTH // 48, generator=generator) / 8
    stem = f"transformer.{PREFIX}.{name}"
    path = tmp_path / "lokr.safetensors"
    save_file({f"{stem}.lokr_w1": w1.bfloat16(), f"{stem}.lokr_w2": w2.bfloat16()}, path)
    layer = model.get_submodule(f"{PREFIX}.{name}")
    x = _x(WIDTH, 512)
    base = layer(x).clone()
    (slot,) = qwenlora.compose_loras(model, path).slots
    assert not slot.energy_lost
    dense = torch.kron(w1.bfloat16().double(), w2.bfloat16().double()).cuda()
    error = relative(layer(x).double() - base.double(), x.double() @ dense.mT)
    record("diffusers' layer, whole LoKr in the MLP", delta=error)
    assert error < BOUND


class _Block(nn.Module):
    """One block with fixed inputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        block = self.model.transformer_blocks[0]
        found = block(image, text, None, temb)
        return found[1], found[0]


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    return _x(WIDTH, 1024), _x(WIDTH, 64) * 0.5, _x(WIDTH, 1)[0]


def _with_terms(model: Any, pairs: dict[str, Pair], run: Any) -> Any:
    """Run with each delta added behind its layer, by hooks: the oracle of a block."""
    handles = [
        model.get_submodule(f"{PREFIX}.{name}").register_forward_hook(
            lambda module, args, out, pair=pair: (out.double() + pair.apply(args[0])).to(out.dtype)
        )
        for name, pair in pairs.items()
    ]
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


def test_a_whole_block(model: Any, tmp_path: Path) -> None:
    # Smaller deltas: a block is not linear, and the next layers round what they are given.
    file, pairs = _write(tmp_path, 100, RANKS)
    block, inputs = _Block(model), _inputs()
    base = [out.clone() for out in block(*inputs)]
    expected = _with_terms(model, pairs, lambda: [out.clone() for out in block(*inputs)])
    qwenlora.compose_loras(model, file)
    found = block(*inputs)
    for stream, ours, its, bare in zip(("image", "text"), found, expected, base, strict=True):
        delta = relative(ours.double() - bare.double(), its.double() - bare.double())
        record(f"diffusers' block, {stream}", delta=delta, output=relative(ours, its))
        assert delta < 0.1


# PyTorch's compiler uses what PyTorch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_compiled_and_switched_without_compiling_again(model: Any, tmp_path: Path) -> None:
    block, inputs = _Block(model), _inputs()
    first, _ = _write(tmp_path, 200, RANKS)
    second, _ = _write(tmp_path, 300, RANKS)
    torch.compiler.reset()
    compiled = torch.compile(block)
    compiled(*inputs)
    qwenlora.compose_loras(model, first)
    compiled(*inputs)
    for stack in (second, [(first, 0.5)], [(second, -1.0)]):
        qwenlora.compose_loras(model, stack)
        with torch.compiler.set_stance("fail_on_recompile"):
            found = [out.clone() for out in compiled(*inputs)]
        expected = block(*inputs)
        error = max(relative(*pair) for pair in zip(found, expected, strict=True))
        record("diffusers' block, compiled against not", output=error)
        assert error < 0.05
    qwenlora.reset_loras(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(*inputs)


def test_reset_is_bit_exact(model: Any, lora: Any) -> None:
    before = {name: own.detach().clone() for name, own in model.named_parameters()}
    inputs = _inputs()
    block = _Block(model)
    base = [out.clone() for out in block(*inputs)]
    qwenlora.compose_loras(model, lora[0])
    twin = copy.deepcopy(model)
    qwenlora.reset_loras(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    qwenlora.reset_loras(twin)
    assert all(torch.equal(before[name], own) for name, own in twin.named_parameters())
    # Kernels add up in any order, and int4 rounding makes that visible.
    for own in (block, _Block(twin)):
        found = own(*inputs)
        assert all(relative(*pair) < 0.05 for pair in zip(found, base, strict=True))


def test_group_offload_with_a_stream_is_refused_and_without_one_works(
    model: Any, lora: Any
) -> None:
    from diffusers.hooks import apply_group_offloading

    expected = copy.deepcopy(model)
    qwenlora.compose_loras(expected, lora[0])
    wanted = [out.clone() for out in _Block(expected)(*_inputs())]
    for use_stream in (False, True):
        own = copy.deepcopy(model)
        with torch.inference_mode(False):
            apply_group_offloading(
                own,
                onload_device=torch.device("cuda"),
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=use_stream,
            )
        if use_stream:
            with pytest.raises(qwenlora.errors.UnsupportedModelError, match="with a stream"):
                qwenlora.compose_loras(own, lora[0])
            continue
        qwenlora.compose_loras(own, lora[0])
        found = _Block(own)(*_inputs())
        assert all(relative(*pair) < 0.05 for pair in zip(found, wanted, strict=True))
