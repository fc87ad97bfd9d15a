"""Factors by block and kind, composed: against deltas that are scaled by hand."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qwenlora
from qwenlora import BlockFactors, ComposeOptions, LoraSet, LoraSpec, Placement, emulation
from qwenlora.compose.planning import plan_report
from qwenlora.emulation import Precision
from qwenlora.errors import BlockFactorsError
from qwenlora.group.partition import apart
from qwenlora.packing.pack import deinterleave_modulation

from .test_adapters import wide_model

BLOCKS = 4
POWERS = "0:2, 1:-0.5, 2-3:0; attn:0.25, mod:-4, rest:8"
"""Powers of two and zeros: what they scale is scaled exactly."""
TEXTS = [
    POWERS,
    "0-1:0.3, 2:0",
    "mod:0",
    "img:0; txt:0.7",
    "attn:1.7, mlp:-0.3; rest:0",
    "1:0.1, 3:3; attn:0.2, mlp:5, mod:-1, img:0.9, txt:1.1, rest:0.01",
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_hand(text, module):
    """The factor that a text gives a module, told from the module's name alone."""
    entries = [entry.split(":") for entry in text.replace(";", ",").split(",")]
    kinds = {"attn"} if ".attn." in module else set()
    kinds |= {kind for kind in ("mlp", "mod") if f"_{kind}." in module}
    kinds |= set() if module.startswith("transformer_blocks.") else {"rest"}
    is_text = any(word in module for word in ("txt_", ".add_", "to_add_out", "norm_added"))
    kinds |= {"txt"} if is_text else set()
    kinds |= set() if is_text or "time_text" in module else {"img"}
    factor = 1.0
    for place, number in entries:
        first, _, last = place.strip().partition("-")
        if first.isdigit():
            named = range(int(first), int(last or first) + 1)
            is_own = module.startswith("transformer_blocks.") and int(module.split(".")[1]) in named
        else:
            is_own = first in kinds
        factor *= float(number) if is_own else 1.0
    return factor


SCALED = ("lora_B.weight", "lokr_w1", "lokr_w1_a", "hada_w1_a", "diff", "diff_b")
"""The tensor of each kind of delta that a factor is multiplied into by hand."""


def module_of(key):
    """(module, role) of a draft's key."""
    stem = key.removeprefix("transformer.")
    ending = next(e for e in (*SCALED, *OTHERS) if stem.endswith(f".{e}"))
    return stem.removesuffix(f".{ending}"), ending


OTHERS = ("lora_A.weight", "alpha", "lokr_w2", "lokr_w1_b", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def scaled_by_hand(tensors, text):
    """A state dict as the factors ask for: scaled tensors, and no module of factor 0."""
    found = {}
    for key, tensor in tensors.items():
        module, role = module_of(key)
        factor = by_hand(text, module)
        if factor != 0:
            found[key] = tensor * factor if role in SCALED else tensor
    return found


@pytest.fixture(scope="module")
def bases(make_model):
    """Models never touched, by dtype."""
    return {dtype: make_model(num_layers=BLOCKS, dtype=dtype) for dtype in DTYPES}


def every_linear(Draft):
    """Every linear of all blocks and of the top level, with an alpha in some."""
    draft = Draft.full(1, 8, blocks=BLOCKS)
    for block in range(BLOCKS):
        draft.add(f"transformer_blocks.{block}.attn.to_out.0", 5, alpha=3.0)
    return draft


@pytest.fixture
def full(Draft):
    return every_linear(Draft)


@pytest.fixture
def file(full, tmp_path):
    """The same in a file: its deltas are kept between compositions."""
    return full.save(tmp_path / "full.safetensors")


@pytest.fixture
def every_kind(Draft):
    """Each kind of adapter in several blocks; deltas of biases, norms and plain linears, too."""
    draft = Draft(2)
    for block in range(BLOCKS):
        stem = f"transformer_blocks.{block}"
        draft.add(f"{stem}.attn.to_q", 4).add(f"{stem}.attn.to_k", 3, alpha=2.0)
        draft.add(f"{stem}.txt_mod.1", 6).put(f"{stem}.txt_mod.1", "diff_b", 768)
        draft.put(f"{stem}.attn.to_add_out", "lokr_w1", 4, 4)
        draft.put(f"{stem}.attn.to_add_out", "lokr_w2", 32, 32)
        draft.put(f"{stem}.img_mlp.net.2", "lokr_w1_a", 4, 2)
        draft.put(f"{stem}.img_mlp.net.2", "lokr_w1_b", 2, 4)
        draft.put(f"{stem}.img_mlp.net.2", "lokr_w2", 32, 128)
        for index in (1, 2):
            draft.put(f"{stem}.img_mod.1", f"hada_w{index}_a", 768, 3)
            draft.put(f"{stem}.img_mod.1", f"hada_w{index}_b", 3, 128)
        draft.put(f"{stem}.attn.to_out.0", "diff", 128, 128)
        draft.put(f"{stem}.attn.norm_added_q", "diff", 64)
    draft.put("proj_out", "diff", 64, 128)
    draft.put("img_in", "lokr_w1", 2, 2).put("img_in", "lokr_w2", 64, 32)
    draft.put("txt_norm", "diff", 96)
    return draft


def copied(bases, dtype=torch.float32, resident=None, device="cpu"):
    model = copy.deepcopy(bases[dtype]).to(device)
    if resident is not None:
        model.set_offload(True, num_blocks_on_gpu=resident)
    return model


def differing(model, other, probe):
    """Names of tensors that differ, those of the buffer blocks by their shapes."""
    found, expected = (
        (
            probe.values(own),
            [
                (name, tensor.shape)
                for block in (own.offload_manager.buffer_blocks if own.offload else ())
                for name, tensor in probe.tensors(block)
            ],
        )
        for own in (model, other)
    )
    names = {**found[0], **expected[0]}
    return [n for n in names if found[0].get(n) != expected[0].get(n)], found[1] == expected[1]


SAME: tuple[list[str], bool] = ([], True)

# ---- the delta ----


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_every_slot_holds_its_modules_times_their_factors(text, strength, full, bases, probe):
    model = copied(bases)
    spec = LoraSpec(full.tensors, strength, blocks=text)
    report = qwenlora.compose_loras(model, spec, strict=True)
    paths = {slot.path for slot in report.slots}
    on = [module for module in full.deltas if by_hand(text, module) != 0]
    assert report.loras[0].modules_applied == len(on)
    for module in full.deltas:
        full.deltas[module] = by_hand(text, module) * full.deltas[module]
    for path in bases[torch.float32].state_dict():
        slot = path.rpartition(".")[0]
        if slot not in paths:
            assert torch.equal(model.state_dict()[path], bases[torch.float32].state_dict()[path])
    off = {m: full.deltas.pop(m) for m in [*full.deltas] if m not in on}
    assert all(not delta.any() for delta in off.values())
    probe.assert_holds(model, [(full, strength)], within=1e-6)
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(probe.snapshot(bases[torch.float32])) == []


@pytest.mark.slow
@pytest.mark.parametrize("resident", [None, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two_are_as_a_file_scaled_by_hand(dtype, resident, full, Draft, bases, probe):
    """Bit for bit, beside another LoRA, and under offload."""
    other = Draft.full(3, 20, blocks=2).tensors
    model, expected = (copied(bases, dtype, resident) for _ in range(2))
    stack = [LoraSpec(full.tensors, 0.6, blocks=POWERS), (other, 0.5)]
    qwenlora.compose_loras(model, stack)
    qwenlora.compose_loras(expected, [(scaled_by_hand(full.tensors, POWERS), 0.6), (other, 0.5)])
    assert differing(model, expected, probe) == SAME
    assert torch.equal(probe.output(model), probe.output(expected))
    with apart():
        one_by_one = copied(bases, dtype, resident)
        qwenlora.compose_loras(one_by_one, stack)
    assert differing(model, one_by_one, probe) == SAME


def measured(model, base, slot, probe):
    """The (out, in) float64 delta of a slot, by calling it; of the fused MLP by its ranks."""
    if "_mlp" in slot:
        return probe.delta(model, slot)
    layers = [own.get_submodule(slot) for own in (model, base)]
    inputs = layers[0].in_features
    with torch.no_grad():
        points = torch.cat([torch.eye(inputs), torch.zeros(1, inputs)])
        found = torch.cat(
            [layers[0](own).double() - layers[1](own).double() for own in points.split(8)]
        )
    delta = (found[:-1] - found[-1:]).mT
    return deinterleave_modulation(delta) if "_mod." in slot else delta


def slot_of(module):
    return module.replace("attn.to_q", "attn.to_qkv").replace("attn.to_k", "attn.to_qkv")


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_every_kind_of_adapter_is_scaled(text, every_kind, bases, probe):
    base, options = bases[torch.float32], ComposeOptions(max_energy_lost=1.0)
    plain, model, scaled = (copied(bases) for _ in range(3))
    qwenlora.compose_loras(plain, every_kind.tensors, options=options)
    qwenlora.compose_loras(model, LoraSpec(every_kind.tensors, blocks=text), options=options)
    by_file = scaled_by_hand(every_kind.tensors, text)
    report = qwenlora.compose_loras(scaled, by_file, options=options)
    assert report.energy_lost < 1e-6
    slots = {slot_of(module_of(key)[0]) for key in every_kind.tensors if "norm" not in key}
    for slot in slots:
        whole, found, other = (measured(own, base, slot, probe) for own in (plain, model, scaled))
        expected = by_hand(text, slot) * whole
        assert whole.norm() > 0
        assert (found - expected).norm() <= 1e-3 * whole.norm(), slot
        assert (found - other).norm() <= 1e-3 * whole.norm(), slot
    for path, value in base.state_dict().items():
        owner, _, name = path.rpartition(".")
        if name == "bias" or "norm" in owner:
            delta = plain.state_dict()[path].double() - value.double()
            found = model.state_dict()[path].double() - value.double()
            assert (found - by_hand(text, owner) * delta).norm() <= 1e-5 * value.double().norm()
            role = "diff_b" if name == "bias" else "diff"
            is_norm = "norm" in owner and "norm_out" not in owner
            if f"transformer.{owner}.{role}" in every_kind.tensors and (
                role == "diff_b" or is_norm
            ):
                assert delta.any()


def test_products_beside_a_layer_are_scaled_bit_for_bit(Draft, probe):
    draft = Draft(1)
    for block, name in itertools.product(range(2), ("attn.to_out.0", "attn.to_add_out")):
        draft.put(f"transformer_blocks.{block}.{name}", "lokr_w1", 16, 16)
        draft.put(f"transformer_blocks.{block}.{name}", "lokr_w2", 16, 16)
    draft.put("norm_out.linear", "diff", 512, 256).put("norm_out.linear", "diff_b", 512)
    text = "1:0.5; txt:-2, rest:4"
    model, expected = wide_model(2), wide_model(2)
    report = qwenlora.compose_loras(model, LoraSpec(draft.tensors, blocks=text))
    assert sum(slot.krons for slot in report.slots) == 4
    assert any(slot.dense for slot in report.slots)
    qwenlora.compose_loras(expected, scaled_by_hand(draft.tensors, text))
    assert differing(model, expected, probe) == SAME


@pytest.fixture(scope="module")
def lites(diffusers):
    """A model of diffusers' own, dense and in 4 bits."""
    pytest.importorskip("diffusers.quantizers.nunchaku")
    from . import test_lite as lite

    torch.manual_seed(0)
    dense = lite.QwenImageTransformer2DModel(**lite.CONFIG | {"num_layers": BLOCKS})
    dense = dense.eval().requires_grad_(False)
    return dense, emulation.lite_transformer(
        dense, rank=32, precision=Precision.EXACT, dtype=torch.float32
    )


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_a_whole_diffusers_model_answers_as_the_dense_one(text, kind, lites):
    """Its attention is in parts, and the file's is fused."""
    from . import test_lite as lite

    dense, model = lites[0], copy.deepcopy(lites[1])
    file = lite.File()
    for block, side in itertools.product(range(BLOCKS), ("to_qkv", "add_qkv_proj")):
        stem = f"transformer_blocks.{block}"
        if kind == "lora":
            file.pair(f"{stem}.attn.{side}", 3 * lite.WIDTH, lite.WIDTH)
        else:
            file.lokr(f"{stem}.attn.{side}", (16, 16), (48, 16))
        file.pair(f"{stem}.img_mod.1", 6 * lite.WIDTH, lite.WIDTH)
        file.pair(f"{stem}.txt_mlp.net.2", lite.WIDTH, 4 * lite.WIDTH)
    file.pair("proj_out", 16, lite.WIDTH)
    qwenlora.compose_loras(model, LoraSpec(file.tensors, blocks=text), strict=True)
    file.deltas = {path: by_hand(text, path) * own for path, own in file.deltas.items()}
    expected = file.merged(dense)
    x, words = torch.randn(1, 16, 16), torch.randn(1, 5, 96)

    def answer(of):
        with torch.no_grad():
            return of(
                hidden_states=x,
                encoder_hidden_states=words,
                encoder_hidden_states_mask=torch.ones(1, 5),
                timestep=torch.tensor([0.5]),
                img_shapes=[[(1, 4, 4)]],
            ).sample

    wanted, base = answer(expected), answer(dense)
    assert (answer(model) - wanted).norm() <= 1e-4 * (wanted - base).norm()


# ---- ways to the same bits ----

CHANGES = [
    "0-1:0.5, 2:-3",
    "0-3:0.3; mod:1e-3, attn:7",
    "",
    "img:-1, txt:0.4, rest:0.2",
]
"""Without zeros: all of them are written in place."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "resident"),
    [("cpu", None), ("cpu", 1), pytest.param("cuda", None, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize(
    "dtype", [DTYPES[0], *(pytest.param(own, marks=pytest.mark.slow) for own in DTYPES[1:])]
)
def test_factors_are_written_in_place(
    dtype, device, resident, file, Draft, bases, probe, rescalings, tmp_path
):
    other = Draft.full(3, 20, blocks=BLOCKS, dtype=torch.float16).save(tmp_path / "b.safetensors")
    model = copied(bases, dtype, resident, device)
    qwenlora.compose_loras(model, [file, other])
    where = probe.addresses(model)
    for number, (text, second) in enumerate(itertools.product(CHANGES, ["", "3:0.1; mlp:-2"])):
        wanted = [
            LoraSpec(file, 0.7 + number, blocks=text),
            LoraSpec(other, -0.5, blocks=second),
        ]
        report = qwenlora.compose_loras(model, wanted)
        expected = copied(bases, dtype, resident, device)
        with apart():
            qwenlora.compose_loras(expected, wanted)
        assert differing(model, expected, probe) == SAME
        assert [lora.blocks for lora in report.loras] == [
            str(BlockFactors.parse(own)) for own in (text, second)
        ]
        assert len(rescalings) == number + 1
    assert probe.addresses(model) == where


def test_only_what_changes_is_written(file, bases, rescalings):
    model = copied(bases)
    written = []
    qwenlora.compose_loras(model, file)
    options = ComposeOptions(progress=lambda *step: written.append(step))
    spec = LoraSpec(file, blocks="mod:0.5")
    qwenlora.compose_loras(model, spec, options=options)
    assert len(written) == 2 * BLOCKS
    assert len(rescalings) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_blocks_that_are_off_under_offload(dtype, file, bases, probe, rescalings):
    """Their slots hold zeros in the ranks that the others have."""
    model = copied(bases, dtype, 1)
    # A resident block, and two of the others.
    off = "0:0, 2-3:0; mod:0"
    qwenlora.compose_loras(model, LoraSpec(file, blocks=off))
    where = probe.addresses(model)
    for number, text in enumerate([f"{off}, attn:0.3", f"1:-2, {off}", off]):
        qwenlora.compose_loras(model, LoraSpec(file, blocks=text))
        expected = copied(bases, dtype, 1)
        with apart():
            qwenlora.compose_loras(expected, LoraSpec(file, blocks=text))
        assert differing(model, expected, probe) == SAME
        assert torch.equal(probe.output(model), probe.output(expected))
        assert len(rescalings) == number + 1
    assert probe.addresses(model) == where
    qwenlora.reset_loras(model)
    assert differing(model, copied(bases, dtype, 1), probe) == SAME


@pytest.mark.slow
@pytest.mark.parametrize("resident", [None, 2])
def test_blocks_are_turned_off_and_on(resident, full, bases, probe):
    model = copied(bases, torch.bfloat16, resident)
    for text in ["", "2-3:0", "0:0; mod:0", "", "0-3:0", "1:0.5", "rest:0, txt:0"]:
        report = qwenlora.compose_loras(model, LoraSpec(full.tensors, blocks=text))
        expected = copied(bases, torch.bfloat16, resident)
        with apart():
            qwenlora.compose_loras(expected, LoraSpec(full.tensors, blocks=text))
        assert differing(model, expected, probe) == SAME
        off = [module for module in full.deltas if text and by_hand(text, module) == 0]
        assert len(report.loras[0].turned_off) == len(off)
        ranks = {slot.path for slot in report.slots if slot.rank > 0}
        assert not ranks & {slot_of(module) for module in off}
    qwenlora.reset_loras(model)
    assert differing(model, copied(bases, torch.bfloat16, resident), probe) == SAME


def test_blocks_that_are_off_take_no_ranks(full, bases):
    model = copied(bases)
    whole = qwenlora.compose_loras(model, full.tensors)
    half = qwenlora.compose_loras(model, LoraSpec(full.tensors, blocks="2-3:0; rest:0"))
    top = sum(1 for slot in whole.slots if not slot.path.startswith("transformer_blocks."))
    assert 2 * len(half.slots) == len(whole.slots) - top
    none = qwenlora.compose_loras(model, LoraSpec(full.tensors, blocks="0-3:0; rest:0"))
    assert (len(none.slots), none.added_bytes) == (0, 0)
    assert none.loras[0].modules_applied == 0


def test_an_error_in_place_leaves_the_old_factors(file, bases, probe):
    model = copied(bases, torch.bfloat16)
    report = qwenlora.compose_loras(model, LoraSpec(file, blocks="0:0.3, 2:-1"))
    before, where = probe.values(model), probe.addresses(model)

    def stop(phase, done, total):
        if done == 20:
            raise KeyboardInterrupt

    wanted = LoraSpec(file, blocks="0:0.7, 1:3")
    with pytest.raises(KeyboardInterrupt):
        qwenlora.compose_loras(model, wanted, options=ComposeOptions(progress=stop))
    assert (probe.values(model), probe.addresses(model)) == (before, where)
    assert qwenlora.applied(model) is report


@pytest.mark.slow
@given(data=st.data())
def test_any_history_leaves_the_same_bits(data, Draft, bases, probe, tmp_path_factory):
    factors = st.sampled_from([0.0, 1.0, 0.5, -0.3, 2.0])
    texts = st.builds(
        BlockFactors.build,
        blocks=st.dictionaries(st.integers(0, BLOCKS - 1), factors),
        kinds=st.dictionaries(
            st.sampled_from(["attn", "mlp", "mod", "img", "txt", "rest"]), factors
        ),
    )
    folder = tmp_path_factory.mktemp("history")
    file = every_linear(Draft).save(folder / "full.safetensors")
    draft = Draft.full(3, 17, blocks=2, dtype=torch.bfloat16)
    other = draft.save(folder / "other.safetensors")
    dtype = data.draw(st.sampled_from(DTYPES))
    resident = data.draw(st.sampled_from([None, 1, 3]))
    model, expected = (copied(bases, dtype, resident) for _ in range(2))
    placements = st.sampled_from(list(Placement))
    for _ in range(data.draw(st.integers(1, 5))):
        loras = [
            LoraSpec(file, data.draw(factors), blocks=data.draw(texts)),
            LoraSpec(other, data.draw(factors), blocks=data.draw(texts)),
        ]
        staging = data.draw(st.sampled_from([1, 1 << 14, 128 << 20]))
        options = ComposeOptions(placement=data.draw(placements), staging_bytes=staging)
        qwenlora.compose_loras(model, loras, options=options)
    with apart():
        qwenlora.compose_loras(expected, loras)
    assert differing(model, expected, probe) == SAME
    qwenlora.reset_loras(model)
    assert differing(model, copied(bases, dtype, resident), probe) == SAME


# ---- identity ----


def test_specs_and_sets_differ_by_their_factors(lora):
    path, _ = lora
    plain, ones = LoraSpec(path), LoraSpec(path, blocks="0-59:1; mod:1")
    half = LoraSpec(path, blocks="0-19:0.5, 20-29: .5")
    assert plain == ones
    assert ones.blocks is None
    assert half == LoraSpec(path, blocks=BlockFactors.parse("0-29:0.5"))
    assert half.blocks == BlockFactors.of("0-29:0.5")
    assert len({plain, ones, half}) == 2
    sets = [LoraSet.of(spec) for spec in (plain, ones, half)]
    assert sets[0] == sets[1]
    assert sets[0].key == sets[1].key != sets[2].key
    for own in (*sets, plain, half):
        assert pickle.loads(pickle.dumps(own)) == own
    assert half.strength_at("transformer_blocks.3.attn.to_q") == 0.5
    with pytest.raises(BlockFactorsError, match="`0-19` at character 8 overlaps `3`"):
        LoraSpec(path, blocks="3:0.5, 0-19:1")
    with pytest.raises(TypeError, match="not list"):
        LoraSpec(path, blocks=[0.5])


def test_all_ones_are_no_change(full, bases):
    model = copied(bases)
    report = qwenlora.compose_loras(model, full.tensors)
    assert qwenlora.compose_loras(model, LoraSpec(full.tensors, blocks="0-3:1")) is report
    other = qwenlora.compose_loras(model, LoraSpec(full.tensors, blocks="3:0.5"))
    assert other is not report
    assert qwenlora.compose_loras(model, LoraSpec(full.tensors, blocks="3:0.50")) is other


def test_the_wrapper_takes_factors(full, bases, probe):
    model, expected = copied(bases), copied(bases)
    wrapper = qwenlora.ComfyQwenImageWrapper.of(model)
    spec = LoraSpec(full.tensors, blocks="0:0; mod:0.5")
    qwenlora.compose_loras(expected, spec)
    for own in ([full.tensors], [spec]):
        wrapper.loras = own
        answer = probe.output(model)
    assert torch.equal(answer, probe.output(expected))
    assert wrapper.report.loras[0].blocks == "0:0; mod:0.5"


# ---- reports ----


def test_a_report_says_the_factors_and_what_they_turn_off(full, bases):
    spec = LoraSpec(full.tensors, 0.8, name="style", blocks="1:0.5, 2-3:0; mod:0")
    wish = 'blocks or kinds of layer are turned off: `LoraSpec(blocks="1:0.5, 2-3:0; mod:0")`'
    model = copied(bases)
    planned = plan_report(model, LoraSet.of(spec))
    report = qwenlora.compose_loras(model, spec, strict=True)
    off = 2 * 14 + 2 * 2
    for said in (planned, report):
        assert said.complete
        assert said.summary().endswith(f"; `style` without {off} ({wish})")
        assert "\n  style x 0.8 (1:0.5, 2-3:0; mod:0): " in said.text()
        assert f"left out as wished: {off} x {wish} (e.g. transformer_blocks." in said.text()
        assert said.to_dict()["loras"][0]["blocks"] == "1:0.5, 2-3:0; mod:0"
        assert len(said.loras[0].turned_off) == off


def test_both_wishes_are_said(full, bases):
    spec = LoraSpec(full.tensors, name="style", blocks="3:0", modulation=False)
    report = qwenlora.compose_loras(copied(bases), spec)
    assert "`style` without 14 (blocks or kinds" in report.summary()
    assert "`style` without 6 (modulation layers are turned off: `LoraSpec(mod" in report.summary()


def test_blocks_that_the_model_lacks_are_said(full, bases):
    note = "`blocks` names 4-19, but the model has the blocks 0 to 3"
    spec = LoraSpec(full.tensors, name="style", blocks="2-19:0.5")
    model = copied(bases)
    report = qwenlora.compose_loras(model, spec)
    assert report.complete
    assert report.loras[0].blocks_note == note
    assert f"`style`: {note}" in report.summary()
    assert f"    note: {note}" in report.text()
    assert plan_report(model, LoraSet.of(spec)).loras[0].blocks_note == note
    with pytest.raises(BlockFactorsError, match=f"`style`: {note}\nhint: "):
        qwenlora.compose_loras(model, spec, strict=True)
    again = qwenlora.compose_loras(model, LoraSpec(full.tensors, name="style", blocks="3:2"))
    assert again.loras[0].blocks_note == ""
