"""diffusers' own 4-bit model: its real classes, with kernels in PyTorch that check each call."""

from __future__ import annotations

import copy
import pickle
from types import MethodType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qwenlora
from qwenlora import emulation, errors
from qwenlora.emulation import KernelContractError, Precision
from qwenlora.group.partition import apart
from qwenlora.packing import pack
from qwenlora.packing.layout import LowRankSide

from .lora_files import File

pytest.importorskip("diffusers.quantizers.nunchaku")
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

BLOCKS = 2
WIDTH = 256
CONFIG = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": BLOCKS,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "axes_dims_rope": (16, 24, 24),
}
DELTA_BOUND = 2e-5
"""Relative error of a delta taken as a difference of float32 outputs; measured: 4.4e-6."""
STREAMS = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(**CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def quantized(dense):
    return emulation.lite_transformer(
        dense, rank=32, precision=Precision.EXACT, dtype=torch.float32
    )


@pytest.fixture
def model(quantized):
    return copy.deepcopy(quantized)


@pytest.fixture(scope="module")
def run():
    generator = torch.Generator().manual_seed(5)
    x, text = (
        torch.randn(1, 16, 16, generator=generator),
        torch.randn(1, 5, 96, generator=generator),
    )

    def run(model):
        dtype = next(model.parameters()).dtype
        with torch.no_grad():
            return model(
                hidden_states=x.to(dtype),
                encoder_hidden_states=text.to(dtype),
                encoder_hidden_states_mask=torch.ones(1, 5),
                timestep=torch.tensor([0.5], dtype=dtype),
                img_shapes=[[(1, 4, 4)]],
            ).sample.float()

    return run


def in_blocks(add) -> File:
    """A file to which `add(file, block's path)` adds each block's modules."""
    file = File()
    for block in range(BLOCKS):
        add(file, f"transformer_blocks.{block}")
    return file


def error_of(model, dense, file, run, base):
    """The relative error of the delta, against the dense model with the file in its weights."""
    expected = run(file.merged(dense)) - run(dense)
    return float((run(model) - base - expected).norm() / expected.norm())


def ranks_of(model):
    """Each packed layer's `rank`, checked to be that of its tensors."""
    ranks = {}
    for path, module in model.named_modules():
        if hasattr(module, "proj_down"):
            assert module.proj_down.shape[1] == module.proj_up.shape[1] == module.rank
            ranks[path] = module.rank
    return ranks


# ---- the emulation ----


def test_the_quantized_model_computes_what_the_dense_one_does(quantized, dense, run):
    expected = run(dense)
    assert float((run(quantized) - expected).norm() / expected.norm()) < 2e-6
    layer = quantized.transformer_blocks[0].attn.to_q
    assert type(layer).__name__ == "SVDQW4A4Linear"
    assert type(layer).forward.__code__.co_filename.endswith("utils.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "dtype"), [("w4a4", torch.bfloat16), ("w4a4", torch.float16)]
)
def test_rounded_as_the_kernels_round(precision, dtype, dense, run):
    model = emulation.lite_transformer(dense, rank=32, precision=Precision(precision), dtype=dtype)
    expected = run(dense)
    assert float((run(model) - expected).norm() / expected.norm()) < 0.05


def test_a_rank_that_is_not_the_tensors_breaks_the_kernels_contract(model, run):
    model.transformer_blocks[0].attn.to_q.rank = 16
    with pytest.raises(KernelContractError, match="lora_down"):
        run(model)


# ---- exact ----


ADAPTERS = {
    "lora": lambda f, b: f.pair(f"{b}.attn.to_qkv", 3 * WIDTH, WIDTH),
    "lora of the text": lambda f, b: f.pair(f"{b}.attn.add_qkv_proj", 3 * WIDTH, WIDTH),
    "apart": lambda f, b: [f.pair(f"{b}.attn.{name}", WIDTH, WIDTH) for name in STREAMS["img"]],
    "tucker": lambda f, b: f.tucker(f"{b}.attn.to_qkv", 3 * WIDTH, WIDTH),
    "loha": lambda f, b: f.loha(f"{b}.attn.to_qkv", 3 * WIDTH, WIDTH),
    "full": lambda f, b: f.full(f"{b}.attn.to_qkv", 3 * WIDTH, WIDTH),
    "bias": lambda f, b: f.pair(f"{b}.attn.to_qkv", 3 * WIDTH, WIDTH).bias(
        f"{b}.attn.to_qkv", 3 * WIDTH
    ),
    "lokr of whole parts": lambda f, b: f.lokr(f"{b}.attn.to_qkv", (12, 16), (64, 16)),
    "lokr cut within its blocks": lambda f, b: f.lokr(f"{b}.attn.to_qkv", (16, 16), (48, 16)),
    "lokr of two large blocks": lambda f, b: f.lokr(f"{b}.attn.to_qkv", (2, 16), (384, 16)),
    "lokr of one block": lambda f, b: f.lokr(f"{b}.attn.to_qkv", (1, 16), (768, 16)),
    "lokr of rows": lambda f, b: f.lokr(f"{b}.attn.to_qkv", (768, 16), (1, 16)),
    "half lokr": lambda f, b: f.half_lokr(f"{b}.attn.to_qkv", (16, 16), (48, 16), 4),
    "whole lokr in the mlp": lambda f, b: [
        f.lokr(f"{b}.{stream}_mlp.net.0.proj", (32, 16), (32, 16)) for stream in STREAMS
    ],
    "whole lokr behind gelu": lambda f, b: f.lokr(f"{b}.img_mlp.net.2", (16, 32), (16, 32)),
    "modulation": lambda f, b: f.pair(f"{b}.img_mod.1", 6 * WIDTH, WIDTH).bias(
        f"{b}.img_mod.1", 6 * WIDTH
    ),
    "modulation lokr": lambda f, b: f.lokr(f"{b}.img_mod.1", (48, 16), (32, 16)),
}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ["file", "state dict"])
def test_every_adapter_is_exact(adapter, kind, model, dense, run, tmp_path, probe):
    file = in_blocks(ADAPTERS[adapter])
    source = file.tensors
    if kind == "file":
        source = tmp_path / "lora.safetensors"
        save_file(file.tensors, source)
    base, before = run(model), probe.snapshot(model)
    report = qwenlora.compose_loras(model, source)
    assert report.complete
    assert not any(lora.notes for lora in report.loras)
    assert error_of(model, dense, file, run, base) < DELTA_BOUND
    ranks_of(model)
    qwenlora.reset_loras(model)
    assert not before.differences(probe.snapshot(model))
    assert torch.equal(run(model), base)


def test_a_lokr_runs_whole_beside_every_layer_of_the_mlp(model):
    """Nunchaku's fused MLP would take ranks alone, and lose most of it."""
    file = in_blocks(ADAPTERS["whole lokr in the mlp"])
    report = qwenlora.compose_loras(model, file.tensors)
    assert all(not slot.rank_added and not slot.energy_lost for slot in report.slots)


def test_every_linear_as_peft_does_it(model, dense, run):
    file = File(1).every_linear(dense)
    theirs = copy.deepcopy(dense)
    theirs.load_lora_adapter(dict(file.tensors), prefix="transformer", adapter_name="one")
    theirs.set_adapters("one", 0.7)
    base = run(model)
    report = qwenlora.compose_loras(model, [(file.tensors, 0.7)])
    assert report.complete
    assert len(report.slots) == 14 * BLOCKS + 6
    expected = run(theirs) - run(dense)
    assert float((run(model) - base - expected).norm() / expected.norm()) < DELTA_BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slots_hold_the_delta_of_the_file(dtype, dense):
    """Rounded weights and activations hide a delta, so the slots themselves are looked at."""
    model = emulation.lite_transformer(dense, rank=32, precision=Precision.W4A4, dtype=dtype)
    file = in_blocks(lambda f, b: [ADAPTERS[name](f, b) for name in ("lora", "lora of the text")])
    qwenlora.compose_loras(model, file.tensors)
    for path, delta in file.deltas.items():
        layer = model.get_submodule(path)
        down = pack.unpack_lowrank(layer.proj_down, LowRankSide.DOWN)[32:].double()
        up = pack.unpack_lowrank(layer.proj_up, LowRankSide.UP)[:, 32:].double()
        assert float((up @ down - delta).norm() / delta.norm()) < 4e-3


def test_a_fused_file_and_one_in_parts_leave_the_same_bits(model, quantized, probe):
    fused, parts = File(), File()
    for block in range(BLOCKS):
        stem = f"transformer_blocks.{block}.attn"
        fused.pair(f"{stem}.to_qkv", 3 * WIDTH, WIDTH)
        down = fused.tensors[f"transformer.{stem}.to_qkv.lora_A.weight"]
        up = fused.tensors[f"transformer.{stem}.to_qkv.lora_B.weight"]
        for name, rows in zip(STREAMS["img"], up.chunk(3), strict=True):
            parts.put(f"{stem}.{name}", lora_A=down, lora_B=rows)
    other = copy.deepcopy(quantized)
    qwenlora.compose_loras(model, fused.tensors)
    qwenlora.compose_loras(other, parts.tensors)
    assert probe.values(model) == probe.values(other)


def test_a_copied_alpha_is_told_of_a_fused_file_in_parts(model):
    """A converter stacked q, k and v block-diagonally: their alpha is then a third."""
    file = in_blocks(lambda f, b: f.pair(f"{b}.attn.to_qkv", 3 * WIDTH, WIDTH, rank=12))
    for block in range(BLOCKS):
        stem = f"transformer.transformer_blocks.{block}.attn.to_qkv"
        up = file.tensors[f"{stem}.lora_B.weight"]
        for row in range(3):
            for column in range(3):
                if row != column:
                    up[row * WIDTH : (row + 1) * WIDTH, column * 4 : (column + 1) * 4] = 0
        file.tensors[f"{stem}.alpha"] = torch.tensor(4.0)
    (lora,) = qwenlora.compose_loras(model, file.tensors).loras
    assert any("alpha" in note for note in lora.notes)


def test_groups_and_single_slots_leave_the_same_bits(model, quantized, dense, probe, tmp_path):
    file = File(2).every_linear(dense)
    save_file(file.tensors, tmp_path / "lora.safetensors")
    other = copy.deepcopy(quantized)
    qwenlora.compose_loras(model, tmp_path / "lora.safetensors")
    with apart():
        qwenlora.compose_loras(other, tmp_path / "lora.safetensors")
    assert probe.values(model) == probe.values(other)
    assert ranks_of(model) == ranks_of(other)


def test_one_file_on_both_forms_in_turn(model, quantized, dense, run, tmp_path):
    """What is kept of a file's deltas for one form is not taken for the other's."""
    file = in_blocks(
        lambda f, b: [
            ADAPTERS[name](f, b) for name in ("lora", "modulation", "whole lokr in the mlp")
        ]
    )
    path = tmp_path / "lora.safetensors"
    save_file(file.tensors, path)
    nunchakus = emulation.EmulatedQwenImageTransformer.from_diffusers(
        dense, rank=32, precision=Precision.EXACT, dtype=torch.float32
    )
    expected = run(file.merged(dense))
    for strength in (1.0, 0.5, 1.0):
        for own in (nunchakus, model):
            qwenlora.compose_loras(own, (path, strength))
    for own in (nunchakus, model):
        assert float((run(own) - expected).norm() / expected.norm()) < DELTA_BOUND


# ---- the rank that the forward reads ----


@pytest.mark.slow
def test_the_rank_moves_with_the_tensors(model, quantized, dense, run, tmp_path):
    """Through strengths, sets that come and go, a copy, and the way back."""
    small, large = File(1).every_linear(dense, 4), File(2).every_linear(dense, 20)
    for name, file in (("small", small), ("large", large)):
        save_file(file.tensors, tmp_path / f"{name}.safetensors")
    first, second = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    base = run(model)
    for stack, added in (
        ([first], 16),
        ([(first, 0.5)], 16),
        ([second], 32),
        ([first, second], 48),
        ([(first, -1.0), (second, 0.25)], 48),
        ([first], 16),
        ([second], 32),
        ([], 0),
    ):
        qwenlora.compose_loras(model, stack)
        assert set(ranks_of(model).values()) == {32 + added}
        fresh = copy.deepcopy(quantized)
        qwenlora.compose_loras(fresh, stack)
        assert torch.equal(run(model), run(fresh))
        twin = copy.deepcopy(model)
        assert torch.equal(run(twin), run(model))
        qwenlora.reset_loras(twin)
        assert set(ranks_of(twin).values()) == {32}
        assert torch.equal(run(twin), base)


class Boom(RuntimeError):
    """Raised by a test in the middle of a composition."""


@pytest.mark.slow
@pytest.mark.parametrize("placement", list(qwenlora.Placement))
@pytest.mark.parametrize("at", [0, 5, 20, 27])
def test_an_error_leaves_ranks_and_tensors_together(placement, at, model, dense, probe):
    old, new = File(1).every_linear(dense, 4), File(2).every_linear(dense, 20)
    base = probe.snapshot(model)
    qwenlora.compose_loras(model, old.tensors)
    before = probe.snapshot(model)

    def progress(phase, done, total):
        if phase == "write" and done == at:
            raise Boom

    options = qwenlora.ComposeOptions(placement=placement, progress=progress)
    with pytest.raises(Boom):
        qwenlora.compose_loras(model, new.tensors, options=options)
    ranks_of(model)
    after = probe.snapshot(model)
    assert not (before.differences(after) and base.tensors != after.tensors)
    qwenlora.reset_loras(model)
    assert not base.differences(probe.snapshot(model))


def test_pickled_and_saved(model, dense, run, tmp_path):
    file = File(1).every_linear(dense, 20)
    base = run(model)
    qwenlora.compose_loras(model, file.tensors)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(loaded), run(model))
    assert set(ranks_of(loaded).values()) == {64}
    qwenlora.reset_loras(loaded)
    assert torch.equal(run(loaded), base)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["transformer_blocks.0.attn.to_q.proj_up"].shape == (WIDTH, 64)
    assert not any("qwenlora" in name for name in saved)


# ---- blocks that are not understood ----


class Reordering(QwenImageTransformerBlock):
    """Takes the rows of its modulation interleaved, as Nunchaku's block does."""

    def _modulate(self, x, mod_params, index=None):
        planes = mod_params.view(mod_params.shape[0], -1, 3).transpose(1, 2).flatten(1)
        return super()._modulate(x, planes, index)


def test_a_stock_block_that_may_reorder_rows_is_refused(model, dense):
    model.transformer_blocks[1].__class__ = Reordering
    with pytest.raises(errors.UnsupportedModelError, match=r"transformer_blocks\.1.*Reordering"):
        qwenlora.compose_loras(model, File().every_linear(dense).tensors)


def test_a_stock_block_with_a_forward_of_its_own_that_may_reorder_rows_is_refused(model, dense):
    block = model.transformer_blocks[1]

    def forward(self, *args, **kwargs):
        return tuple(out.transpose(0, 0) for out in type(self).forward(self, *args, **kwargs))

    block.forward = MethodType(forward, block)
    with pytest.raises(errors.UnsupportedModelError, match=r"transformer_blocks\.1.*reorder"):
        qwenlora.compose_loras(model, File().every_linear(dense).tensors)


def test_an_mlp_with_a_forward_of_its_own_that_fuses_takes_ranks_alone(model):
    mlp = model.transformer_blocks[0].img_mlp

    def forward(self, hidden_states):
        return self.net[2](torch.nn.functional.gelu(self.net[0].proj(hidden_states)))

    mlp.forward = MethodType(forward, mlp)
    report = qwenlora.compose_loras(model, in_blocks(ADAPTERS["whole lokr in the mlp"]).tensors)
    ranks = {slot.path: slot.rank_added for slot in report.slots}
    assert ranks["transformer_blocks.0.img_mlp.net.0.proj"] == 256
    assert ranks["transformer_blocks.1.img_mlp.net.0.proj"] == 0


def test_a_block_with_both_kinds_of_attention_is_refused(model, dense):
    model.transformer_blocks[0].attn.to_qkv = nn.Linear(WIDTH, 3 * WIDTH)
    with pytest.raises(errors.UnsupportedModelError, match="neither"):
        qwenlora.compose_loras(model, File().every_linear(dense).tensors)


def test_a_stock_block_whose_mlp_was_fused_takes_ranks_alone(model):
    """What calls its layers' kernels itself runs no hook of theirs."""
    mlp = model.transformer_blocks[0].img_mlp
    kind = type(mlp)

    class Fused(kind):
        def forward(self, hidden_states):
            return self.net[2](torch.nn.functional.gelu(self.net[0].proj(hidden_states)))

    mlp.__class__ = Fused
    file = in_blocks(ADAPTERS["whole lokr in the mlp"])
    report = qwenlora.compose_loras(model, file.tensors)
    ranks = {slot.path: slot.rank_added for slot in report.slots}
    assert ranks["transformer_blocks.0.img_mlp.net.0.proj"] == 256
    assert ranks["transformer_blocks.1.img_mlp.net.0.proj"] == 0


# ---- offload by others ----


def _model_offload(model):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, execution_device=torch.device("cpu"))


def _groups(offload_type):
    def turn_on(model):
        from diffusers.hooks import apply_group_offloading

        cpu = torch.device("cpu")
        apply_group_offloading(
            model,
            onload_device=cpu,
            offload_device=cpu,
            offload_type=offload_type,
            num_blocks_per_group=1,
        )

    return turn_on


def _sequential(model):
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


LASTING = {
    "model": _model_offload,
    "groups of blocks": _groups("block_level"),
    "groups of leaves": _groups("leaf_level"),
}


@pytest.mark.slow
@pytest.mark.parametrize("offload", LASTING)
@pytest.mark.parametrize("first", ["offload", "compose"])
def test_offload_that_moves_what_is_there(offload, first, model, quantized, dense, run):
    file, base = File(1).every_linear(dense), run(quantized)
    expected = copy.deepcopy(quantized)
    qwenlora.compose_loras(expected, file.tensors)
    steps = [LASTING[offload], lambda model: qwenlora.compose_loras(model, file.tensors)]
    for step in steps if first == "offload" else reversed(steps):
        step(model)
    assert torch.equal(run(model), run(expected))
    qwenlora.compose_loras(model, [(file.tensors, 0.5)])
    qwenlora.compose_loras(expected, [(file.tensors, 0.5)])
    assert torch.equal(run(model), run(expected))
    qwenlora.reset_loras(model)
    assert torch.equal(run(model), base)


def test_sequential_offload_holds_the_weights_elsewhere(model, quantized, dense, run):
    file, base = File(1).every_linear(dense), copy.deepcopy(quantized)
    qwenlora.compose_loras(base, file.tensors)
    qwenlora.compose_loras(model, file.tensors)
    _sequential(model)
    assert torch.equal(run(model), run(base))
    for stack in (file.tensors, []):
        with pytest.raises(errors.UnsupportedModelError, match="sequential offload"):
            qwenlora.compose_loras(model, [(stack, 0.5)] if stack else [])


@pytest.mark.parametrize("way", ["stream", "disk"])
def test_group_offload_that_puts_old_weights_back_is_refused(way, model, dense):
    """A stream needs a GPU; its hook is here as diffusers leaves it."""
    group = SimpleNamespace(
        stream=object() if way == "stream" else None,
        offload_to_disk_path="folder" if way == "disk" else None,
    )
    hook = SimpleNamespace(group=group)
    block = model.transformer_blocks[1]
    block._diffusers_hook = SimpleNamespace(hooks={"group_offloading": hook})
    with pytest.raises(errors.UnsupportedModelError, match=r"`transformer_blocks\.1`.*groups"):
        qwenlora.compose_loras(model, File().every_linear(dense).tensors)


# ---- compiled ----


COMPILED = {
    # Inductor takes a minute for each state of a block.
    "inductor, repeated blocks": ("inductor", True, lambda file: [file, []]),
    "eager, repeated blocks": ("eager", True, lambda file: [file, [(file, 0.5)], [], file]),
    "eager, whole": ("eager", False, lambda file: [file, [(file, 0.5)], [], file]),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name, model, quantized, run):
    torch.compiler.reset()
    backend, in_repeated_blocks, stacks = COMPILED[name]
    file = in_blocks(lambda f, b: [ADAPTERS[name](f, b) for name in ("lora", "modulation")])
    base = run(model)
    compiled = model
    if in_repeated_blocks:
        model.compile_repeated_blocks(backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)
    run(compiled)
    expected = copy.deepcopy(quantized)
    for stack in stacks(file.tensors):
        qwenlora.compose_loras(model, stack)
        qwenlora.compose_loras(expected, stack)
        wanted = run(expected)
        assert float((run(compiled) - wanted).norm() / wanted.norm()) < 2e-6
        assert float((wanted - base).norm() / base.norm()) > 0.1 or not stack
