"""What a map says of files: norms against dense float64 deltas, and where all of it is drawn.

The known models are shrunk where deltas are formed; places and pictures are those of the real ones.
"""

from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont
from safetensors.torch import save_file

from qwenlora import LoraSpec, cli, errors
from qwenlora.map.change import DeltaMap, ModuleChange, State
from qwenlora.map.grid import Grid
from qwenlora.map.job import map_loras
from qwenlora.map.png import to_image, to_png
from qwenlora.map.scale import Scale, color_at, percent
from qwenlora.map.scene import Line, Rect, Text, scene_of, scene_of_text
from qwenlora.map.svg import to_svg
from qwenlora.map.terminal import Colors, draw
from qwenlora.merge.known import KnownSlot, known_slots
from qwenlora.plan.documents import SlotKind
from qwenlora.sizes import sized

from .adapter_files import KINDS, AdapterFile, Module
from .lora_files import File

FLOAT32 = 2e-6
"""Relative error of a norm from float32 products; measured: 2e-7."""
SHRUNK = {3072: 48, 12288: 192, 18432: 288, 64: 16, 3584: 56, 256: 32, 6144: 96, 128: 8}
"""Sides of the small model, by those of Qwen-Image."""
BASED = ("dora", "ia3", "glora", "hra", "oft", "diag-oft", "boft", "set_weight")
"""Beginnings of the names of kinds that are made of the base weight."""
BLOCK = "transformer_blocks.1"


def shrunk(blocks=2):
    """The slots of a small Qwen-Image."""
    known = {}
    for path, slot in known_slots("qwen-image").items():
        number = re.match(r"transformer_blocks\.([0-9]+)\.", path)
        if number is None or int(number[1]) < blocks:
            out, columns = slot.sides
            rows, columns = SHRUNK[out] * len(slot.parts), SHRUNK.get(columns, columns)
            row = slot.row._replace(out_features=rows, in_features=columns)
            known[path] = KnownSlot(row, slot.parts)
    return known


KNOWN = shrunk()


@pytest.fixture
def mapped(tmp_path):
    """The map of files, dicts of tensors or paths at strengths, and factors by block."""
    made = iter(range(100))

    def mapped(*stack):
        specs = []
        for source, strength, *blocks in stack:
            tensors = getattr(source, "tensors", source)
            if isinstance(tensors, dict):
                source = tmp_path / f"source-{next(made)}.safetensors"
                save_file({key: t.contiguous().clone() for key, t in tensors.items()}, source)
            specs.append(LoraSpec(source, strength, blocks=next(iter(blocks), None)))
        return map_loras(specs, known=KNOWN)

    return mapped


def norms(found):
    return {path: change.norm for path, change in found.modules.items() if change.norm}


def require_norms(found, deltas, tolerance=FLOAT32):
    expected = {path: float(delta.double().norm()) for path, delta in deltas.items()}
    assert norms(found) == pytest.approx(expected, rel=tolerance)
    for path, delta in deltas.items():
        strength = expected[path] / math.sqrt(len(delta))
        assert found.modules[path].strength == pytest.approx(strength, rel=tolerance)


# ---- norms ----


def module(path, kind=SlotKind.SVDQ):
    """A module of the small model with a weight of its own."""
    slot = next(slot for slot in KNOWN.values() if path in slot.parts)
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(slot.sides, generator=generator, dtype=torch.float64)
    bias = torch.randn(len(weight), generator=generator, dtype=torch.float64)
    return Module(path, path, 0, weight, bias, kind, kept_bias=torch.zeros_like(bias))


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_every_trainer(name, mapped, tmp_path):
    """Its norm is that of W' - W; where that depends on W, no number is given."""
    own = module("proj_out" if name == "set_weight" else f"{BLOCK}.img_mlp.net.0.proj")
    own = replace(own, kind=SlotKind.LINEAR if name == "set_weight" else SlotKind.SVDQ)
    file = AdapterFile.of(name, [own])
    assert file.merged
    found = mapped((file.save(tmp_path / "file"), 0.5))
    change = found.modules[own.name]
    if name.startswith(BASED):
        assert (change.state, change.strength, change.norm) == (State.NEEDS_BASE, 0, 0)
        assert "base weight" in change.reason
        assert not found.complete
    else:
        delta = 0.5 * (file.merged[own.name].weight - own.weight)
        require_norms(found, {own.name: delta})
        assert found.complete


def test_kinds_without_a_base_are_all_measured():
    measured = [name for name in KINDS if not name.startswith(BASED)]
    assert {"lora", "lokr", "full"} <= set(measured)


def every_form():
    file = File(3)
    file.pair(f"{BLOCK}.attn.to_out.0", 48, 48, rank=5)
    file.pair(f"{BLOCK}.attn.to_qkv", 144, 48, rank=3)
    file.lokr(f"{BLOCK}.img_mlp.net.0.proj", (4, 6), (48, 8))
    file.half_lokr(f"{BLOCK}.img_mlp.net.2", (6, 4), (8, 48), 2)
    file.loha(f"{BLOCK}.txt_mlp.net.2", 48, 192)
    file.tucker(f"{BLOCK}.txt_mlp.net.0.proj", 192, 48)
    file.full(f"{BLOCK}.img_mod.1", 288, 48)
    file.full("proj_out", 16, 48)
    return file


def test_every_form_of_a_delta(mapped):
    file = every_form()
    require_norms(mapped((file, 1.0)), file.deltas)


def test_fused_forms_are_cut_to_their_modules(mapped):
    """144 rows of query, key and value: a third ends within a row of w1."""
    file = File(4)
    file.lokr(f"{BLOCK}.attn.to_qkv", (16, 6), (9, 8))
    file.full(f"{BLOCK}.attn.add_qkv_proj", 144, 48)
    assert 48 % 9
    require_norms(mapped((file, 1.0)), file.deltas)


def test_a_wide_loha_goes_by_rows(mapped):
    """12 times 12 ranks are more than the matrix has."""
    file = File(5).loha(f"{BLOCK}.txt_mlp.net.2", 48, 192, rank=12)
    with sized(panel_bytes=4 * 192 * 7):
        require_norms(mapped((file, 1.0)), file.deltas)


@given(
    rank=st.integers(1, 70),
    power=st.integers(-24, 24),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_pair(rank, power, seed, dtype, tmp_path_factory):
    """Of any rank, also above the module's sides, and of any size that the dtype holds."""
    if dtype == torch.float16:
        power = max(-4, min(2, power))
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, 48, generator=generator).to(dtype)
    up = (torch.randn(16, rank, generator=generator) * 10.0**power).to(dtype)
    path = tmp_path_factory.mktemp("pair") / "pair.safetensors"
    save_file({"proj_out.lora_A.weight": down, "proj_out.lora_B.weight": up}, path)
    found = map_loras([LoraSpec(path)], known=KNOWN)
    require_norms(found, {"proj_out": up.double() @ down.double()})


def test_scales_strengths_and_factors_by_block(mapped):
    file = File(6)
    file.pair(f"{BLOCK}.attn.to_out.0", 48, 48, rank=4)
    file.pair("transformer_blocks.0.attn.to_out.0", 48, 48, rank=4)
    file.tensors["transformer.transformer_blocks.0.attn.to_out.0.alpha"] = torch.tensor(1.0)
    found = mapped((file, -2.0, "1:0.25"))
    delta = file.deltas
    require_norms(
        found,
        {
            "transformer_blocks.0.attn.to_out.0": delta["transformer_blocks.0.attn.to_out.0"] / 2,
            f"{BLOCK}.attn.to_out.0": delta[f"{BLOCK}.attn.to_out.0"] / 2,
        },
    )


def test_values_are_part_of_what_a_module_adds(mapped):
    """A bias adds to the output as the weight does; norms and tables have values alone."""
    path, norm = f"{BLOCK}.img_mlp.net.0.proj", f"{BLOCK}.attn.norm_q"
    file = File(8).pair(path, 192, 48).bias(path, 192).norm(norm, 8)
    table = file.random(2, 48)
    file.tensors["transformer.time_text_embed.addition_t_embedding.diff"] = table
    found = mapped((file, 0.5))
    both = float(file.deltas[path].norm()) ** 2 + float(file.biases[path].norm()) ** 2
    change = found.modules[path]
    assert change.norm == pytest.approx(0.5 * float(file.deltas[path].norm()), rel=FLOAT32)
    assert change.strength == pytest.approx(0.5 * math.sqrt(both / 192), rel=FLOAT32)
    rms = 0.5 * float(file.norms[norm].square().mean().sqrt())
    assert found.modules[norm].strength == pytest.approx(rms, rel=FLOAT32)
    rms = 0.5 * float(table.square().mean().sqrt())
    change = found.modules["time_text_embed.addition_t_embedding"]
    assert change.strength == pytest.approx(rms, rel=FLOAT32)


def test_strength_is_what_a_layer_puts_out():
    """The definition, measured: rms of the output on independent inputs of rms 1."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(192, 48, generator=generator) * 0.01
    inputs = torch.randn(48, 20_000, generator=generator)
    outputs = float((delta @ inputs).square().mean().sqrt())
    strength = float(delta.norm()) / math.sqrt(192)
    assert outputs == pytest.approx(strength, rel=0.02)
    typical = torch.randn(192, 48, generator=generator) / math.sqrt(48)
    assert float(typical.norm()) / math.sqrt(192) == pytest.approx(1, rel=0.02)
    assert strength == pytest.approx(float(delta.square().mean().sqrt()) * math.sqrt(48), rel=1e-6)


# ---- sums ----


def test_a_sum_has_its_cross_terms(mapped):
    """Every form beside a pair, and beside itself of another seed."""
    first, second = every_form(), File(9)
    for path, delta in first.deltas.items():
        second.pair(path, *delta.shape, rank=6)
    found = mapped((first, 0.8), (second, -0.5))
    deltas = {
        p: 0.8 * d.double() - 0.5 * second.deltas[p].double() for p, d in first.deltas.items()
    }
    require_norms(found, deltas)
    apart = {
        path: math.hypot(0.8 * float(d.norm()), 0.5 * float(second.deltas[path].norm()))
        for path, d in first.deltas.items()
    }
    assert any(abs(apart[path] / norm - 1) > 0.01 for path, norm in norms(found).items())


def test_a_lora_less_itself_is_zero(mapped):
    file = every_form()
    found = mapped((file, 0.7), (file, -0.7))
    assert {change.state for change in found.modules.values()} == {State.ZERO}
    assert found.strongest is None
    assert found.complete


def test_what_rounding_leaves_of_zero_is_zero(mapped):
    """Neither 0.3 nor 0.1 is a float32, and a third of the one is not the other."""
    once, thrice = File(1).pair("proj_out", 16, 48), File(1).pair("proj_out", 16, 48)
    thrice.tensors["transformer.proj_out.lora_B.weight"] *= 3
    found = mapped((once, 0.3), (thrice, -0.1))
    assert found.modules["proj_out"].state is State.ZERO


def test_fused_forms_are_cut_in_sums_too(mapped):
    first, second = File(4), File(5)
    first.lokr(f"{BLOCK}.attn.to_qkv", (16, 6), (9, 8))
    second.full(f"{BLOCK}.attn.to_qkv", 144, 48)
    deltas = {path: delta - 2 * second.deltas[path] for path, delta in first.deltas.items()}
    require_norms(mapped((first, 1.0), (second, -2.0)), deltas)
    third = File(6)
    third.pair(f"{BLOCK}.attn.to_qkv", 144, 48)
    deltas = {path: delta - 2 * third.deltas[path] for path, delta in first.deltas.items()}
    require_norms(mapped((first, 1.0), (third, -2.0)), deltas)


def test_a_lokr_that_a_pair_takes_back(mapped):
    """What is left of it is a thousandth, of which the cross term alone would leave no digit."""
    path = f"{BLOCK}.img_mlp.net.0.proj"
    kron = File(7).lokr(path, (1, 1), (192, 48))
    delta = kron.deltas[path].double()
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    pair = File(8)
    pair.put(path, lora_A=right.float(), lora_B=(left * values * 0.999).float())
    found = mapped((kron, 1.0), (pair, -1.0))
    require_norms(found, {path: delta / 1000}, tolerance=1e-3)


@pytest.mark.parametrize("small", [1e-2, 1e-3, 1e-4])
def test_what_nearly_cancels_keeps_its_digits(mapped, small):
    """Gram matrices in float32 would have no digit of it left."""
    first, second = File(1), File(1)
    path = f"{BLOCK}.attn.to_out.0"
    first.pair(path, 48, 48, rank=8)
    second.pair(path, 48, 48, rank=8)
    down = second.tensors[f"transformer.{path}.lora_A.weight"]
    down += small * torch.randn(down.shape, generator=torch.Generator().manual_seed(2))
    up = second.tensors[f"transformer.{path}.lora_B.weight"]
    second.deltas[path] = up.double() @ down.double()
    exact = up.double() @ first.tensors[f"transformer.{path}.lora_A.weight"].double()
    found = mapped((first, 1.0), (second, -1.0))
    require_norms(found, {path: exact - second.deltas[path]}, tolerance=1e-5)


def test_a_sum_with_what_needs_the_base_has_no_number(mapped, tmp_path):
    own = module(f"{BLOCK}.img_mlp.net.0.proj")
    based = AdapterFile.of("dora of rows", [own]).save(tmp_path / "dora")
    plain = File(2).pair(own.name, 192, 48)
    found = mapped((plain, 1.0), (based, 1.0))
    assert found.modules[own.name].state is State.NEEDS_BASE


# ---- what has no size ----


def test_damage_is_named(mapped):
    file = every_form()
    for key, tensor in file.tensors.items():
        tensor = tensor.clone()
        if tensor.ndim and not key.endswith("alpha"):
            tensor.view(-1)[0] = float("nan")
            file.tensors[key] = tensor
    found = mapped((file, 1.0))
    # The first row of a fused pair's `up` is the query's alone, its `down` is everyone's.
    assert {change.state for change in found.modules.values()} == {State.DAMAGED}
    assert found.strengths == {}


def test_infinity_is_damage_too(mapped):
    file = File(1).pair("proj_out", 16, 48)
    file.tensors["transformer.proj_out.lora_B.weight"][3, 1] = math.inf
    assert mapped((file, 1.0)).modules["proj_out"].state is State.DAMAGED


def test_zero_is_no_number(mapped):
    file = File(1).pair("proj_out", 16, 48)
    file.tensors["transformer.proj_out.lora_B.weight"].zero_()
    found = mapped((file, 1.0))
    assert found.modules["proj_out"].state is State.ZERO
    assert found.complete


def test_what_is_not_applied_has_a_place(mapped):
    file = File(1).pair("proj_out", 16, 48)
    file.tensors["transformer.img_in.lora_A.weight"] = file.random(4, 16)
    # Of three modules, none of which is known by itself.
    file.tensors[f"transformer.{BLOCK}.attn.to_qkv.lora_A.weight"] = file.random(4, 48)
    # Of another component: no part of the delta.
    file.tensors["text_encoder.layers.0.q_proj.lora_A.weight"] = file.random(4, 16)
    found = mapped((file, 1.0))
    assert found.modules["img_in"].state is State.LEFT_OUT
    assert "has down but no up" in found.modules["img_in"].reason
    assert found.left_out == 1
    assert not found.complete


def test_refusals(mapped, tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file(
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 4)}, foreign
    )
    with pytest.raises(errors.OtherModelError):
        mapped((foreign, 1.0))
    file = File(1).pair("proj_out", 16, 48)
    with pytest.raises(errors.NothingToApplyError, match="strength"):
        mapped((file, 0.0))
    with pytest.raises(errors.LoraNotFoundError):
        mapped((tmp_path / "none.safetensors", 1.0))


def test_torchs_threads_are_as_they_were(mapped):
    """Also after an error; meanwhile there is one."""
    threads = torch.get_num_threads()
    file = File(1).pair("proj_out", 16, 48)
    mapped((file, 1.0))
    assert torch.get_num_threads() == threads

    def progress(_done, _all):
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_loras([LoraSpec(file.tensors)], known=KNOWN, progress=progress)
    assert torch.get_num_threads() == threads


# ---- scale ----

STRENGTHS = st.lists(st.floats(1e-9, 1e6), min_size=1, max_size=20)


@given(STRENGTHS)
def test_the_scale_spans_what_is_found(strengths):
    scale = Scale.of(strengths)
    assert scale.high >= max(strengths) * (1 - 1e-6)
    assert scale.high <= 2.6 * max(strengths)
    assert scale.low <= min(strengths) * (1 + 1e-6) or scale.low >= scale.high / 1001
    places = [scale.place(strength) for strength in sorted(strengths)]
    assert places == sorted(places)
    assert 0 <= places[0] <= places[-1] <= 1
    ticks = scale.ticks()
    assert ticks == sorted(ticks)
    assert ticks[0] == pytest.approx(scale.low)
    assert ticks[-1] == pytest.approx(scale.high)


def test_equal_ratios_are_equal_steps():
    scale = Scale(1e-4, 1e-1)
    assert scale.place(1e-4) == 0
    assert scale.place(1e-3) == pytest.approx(1 / 3)
    assert scale.place(1e-1) == 1
    assert Scale.of([]).place(0.0) == 0


def luminance(color):
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def test_brighter_is_stronger():
    """In grey, too: no pair of colours needs its hue to be told apart."""
    found = [luminance(color_at(at / 50)) for at in range(51)]
    assert found == sorted(found)
    assert found[-1] > 15 * found[0]
    ground = luminance(scene_of_text("", "").ground)
    assert all(own > 2 * ground for own in found)


def test_percent():
    texts = {0.0002: "0.02 %", 0.001234: "0.12 %", 0.02: "2 %", 0.5: "50 %", 3.0: "300 %"}
    assert {value: percent(value) for value in texts} == texts


# ---- places ----


@pytest.mark.parametrize("model", ["qwen-image", "z-image"])
def test_every_module_has_one_place(model):
    paths = [path for slot in known_slots(model).values() for path in slot.parts]
    grid = Grid.of(paths, paths)
    cells = [
        f"{columns.path}.{number}.{row.tail}"
        for row in grid.rows
        for columns in grid.columns
        for number in range(columns.count)
    ]
    places = [*cells, *(path for _, path in grid.outside)]
    assert len(places) == len(set(places))
    assert set(paths) <= set(places)
    for labels in ([row.label for row in grid.rows], [label for label, _ in grid.outside]):
        assert len(labels) == len(set(labels))
        assert not any("." in label or "_" in label for label in labels), "a name of its own"


def test_rare_rows_are_there_where_they_are_trained():
    paths = [path for slot in known_slots("qwen-image").values() for path in slot.parts]
    plain, trained = Grid.of(paths, ()), Grid.of(paths, [f"{BLOCK}.attn.norm_k"])
    assert [row.label for row in trained.rows if row not in plain.rows] == ["image k norm"]
    assert len(plain.rows) == 14


# ---- pictures ----


def synthetic(model="qwen-image", title="style", **states):
    """A map of a real model with a strength on each linear, and states on modules by path."""
    paths = [path for slot in known_slots(model).values() for path in slot.parts]
    modules = {
        path: ModuleChange(State.CHANGED, 1e-4 * (1 + at % 97), 1.0)
        for at, path in enumerate(paths)
        if "norm_" not in path
    }
    modules |= {path: ModuleChange(state) for path, state in states.items()}
    return DeltaMap(title, model, tuple(paths), modules)


ALL_STATES = {
    f"{BLOCK}.attn.to_q": State.ZERO,
    f"{BLOCK}.attn.to_k": State.NEEDS_BASE,
    f"{BLOCK}.attn.to_v": State.LEFT_OUT,
    f"{BLOCK}.attn.to_out.0": State.DAMAGED,
}


def box(shape):
    """Left, top, right and bottom of a shape, as Pillow draws it."""
    if isinstance(shape, Rect):
        return shape.x, shape.y, shape.x + shape.width, shape.y + shape.height
    if isinstance(shape, Line):
        xs, ys = sorted((shape.x, shape.to_x)), sorted((shape.y, shape.to_y))
        return xs[0], ys[0], xs[1], ys[1]
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
    left, top, right, bottom = ImageFont.load_default(shape.size).getbbox(shape.text, anchor=anchor)
    return shape.x + left, shape.y + top, shape.x + right, shape.y + bottom


@pytest.mark.parametrize(
    "maps",
    [
        [synthetic(**ALL_STATES)],
        [synthetic("z-image")],
        [synthetic(title="a" * 400), synthetic("z-image", title="other")],
        [DeltaMap("nothing", "qwen-image", ("proj_out",), {})],
    ],
    ids=["states", "z-image", "two", "nothing"],
)
def test_all_is_in_the_picture_and_texts_keep_apart(maps):
    scene = scene_of(maps)
    for shape in scene.shapes:
        left, top, right, bottom = box(shape)
        assert 0 <= left <= right <= scene.width, shape
        assert 0 <= top <= bottom <= scene.height, shape
    texts = [box(shape) for shape in scene.shapes if isinstance(shape, Text) and shape.text]
    others = [box(shape) for shape in scene.shapes if isinstance(shape, Rect)]
    for at, own in enumerate(texts):
        for other in [*texts[at + 1 :], *others]:
            apart_x = own[2] <= other[0] or other[2] <= own[0]
            apart_y = own[3] <= other[1] or other[3] <= own[1]
            assert apart_x or apart_y, (own, other)


def test_two_maps_have_one_scale():
    weak = synthetic(title="weak")
    strong = replace(
        weak,
        title="strong",
        modules={p: replace(c, strength=8 * c.strength) for p, c in weak.modules.items()},
    )
    both, alone = scene_of([weak, strong]), scene_of([weak])

    def cells(scene):
        return [s.fill for s in scene.shapes if isinstance(s, Rect) and s.width == s.height == 16]

    first, second = cells(both)[: len(cells(alone))], cells(alone)
    assert first != second, "it is drawn on the scale of both"
    assert len(cells(both)) == 2 * len(cells(alone)) - 1  # one legend


def test_the_png_has_the_colours_of_the_scale():
    own = synthetic()
    scene = scene_of([own])
    scale = Scale.of(own.strengths.values())
    image = Image.open(io.BytesIO(to_png(scene, scale=1)))
    assert image.size == (scene.width, scene.height)
    cells = [s for s in scene.shapes if isinstance(s, Rect) and s.width == s.height == 16]
    expected = {scale.color(strength) for strength in own.strengths.values()}
    found = {image.getpixel((int(cell.x + 8), int(cell.y + 8))) for cell in cells}
    assert expected <= found
    assert to_image(scene, scale=2).size == (2 * scene.width, 2 * scene.height)


def test_the_svg_is_one_document_whatever_the_title():
    hostile = '<script>alert("x")</script>&amp;\x00\x1b[2J\ud800\n'
    scene = scene_of([synthetic(title=hostile, **ALL_STATES)])
    text = to_svg(scene).encode("utf-8").decode("utf-8")
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("viewBox") == f"0 0 {scene.width} {scene.height}"
    assert {element.tag for element in root} == {space + n for n in ("rect", "line", "text")}
    assert len(root) == len(scene.shapes) + 1
    titles = [element.text for element in root.iter(space + "text")]
    assert any("<script>" in title for title in titles)


def test_a_picture_of_words():
    scene = scene_of_text("No map: x.safetensors", "it is for another model\nhint: take another")
    texts = [shape.text for shape in scene.shapes]
    assert texts == ["No map: x.safetensors", "it is for another model", "hint: take another"]
    assert to_image(scene).size[1] == 2 * scene.height


def test_names_of_other_scripts_are_cut_to_the_picture():
    scene = scene_of_text("\u753b" * 300, "")
    title = scene.shapes[0].text
    assert title.endswith("...")
    assert 30 < len(title) < 60
    to_image(scene)


@pytest.mark.parametrize("fault", ["absent", "old"])
def test_without_pillow_it_says_what_to_do(monkeypatch, fault):
    if fault == "absent":
        monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    else:

        def load_default():
            raise AssertionError

        monkeypatch.setattr(ImageFont, "load_default", load_default)
    with pytest.raises(errors.OutputError, match=r"pip install qwenlora\[map\]"):
        to_image(scene_of([synthetic()]))


# ---- terminal ----

ESCAPE = re.compile("\x1b\\[[0-9;]*m")


@pytest.mark.parametrize("model", ["qwen-image", "z-image"])
@pytest.mark.parametrize("colors", list(Colors))
def test_the_terminals_map_fits_80_columns(model, colors):
    states = ALL_STATES if model == "qwen-image" else {}
    text = draw([synthetic(model, **states)], colors)
    assert all(len(ESCAPE.sub("", line)) <= 80 for line in text.splitlines())
    assert ("\x1b" in text) == (colors is not Colors.NONE)
    assert text.isascii()
    # A colour ends on the line that it begins on.
    for line in text.splitlines():
        assert line.count("\x1b[0m") == line.count("\x1b[48;")


def test_the_terminals_map_shows_every_state():
    text = draw([synthetic(**ALL_STATES)], Colors.NONE)
    rows = {line[:18].strip(): line[18:] for line in text.splitlines()}
    marks = [rows[f"image {name}"][1] for name in ("q", "k", "v", "attn out")]
    assert marks == ["o", "/", "-", "!"]
    assert set(rows["image q"][2:]) <= set("0123456789")
    assert "needs the base weight" in text
    assert "1 damaged" in " ".join(text.split())


def test_weaker_is_a_smaller_digit():
    own = synthetic()
    path = "transformer_blocks.{}.attn.to_q"
    changes = {path.format(at): ModuleChange(State.CHANGED, 2.0**at * 1e-6) for at in range(10)}
    text = draw([replace(own, modules=changes)], Colors.NONE)
    (row,) = (line for line in text.splitlines() if line.startswith("image q "))
    digits = row[18:28]
    assert digits == "".join(sorted(digits))
    assert len(set(digits)) > 5
    assert row[28:] == "." * 50


# ---- commands ----


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    for name, rank in (("a", 4), ("b", 2)):
        generator = torch.Generator().manual_seed(rank)
        tensors = {
            "proj_out.lora_A.weight": torch.randn(rank, 3072, generator=generator),
            "proj_out.lora_B.weight": 1e-4 * torch.randn(64, rank, generator=generator),
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    return tmp_path


@pytest.fixture
def run(folder, capfd):
    def run(*args):
        status = cli.main(["map", *map(str, args)])
        return int(status), *capfd.readouterr()

    return run


def test_a_map_on_the_terminal(run):
    status, out, err = run("a.safetensors")
    assert (status, err) == (0, "")
    assert out.startswith("a\n1 module, median ")
    assert "\x1b" not in out
    status, out, _ = run("a.safetensors", "--color", "always")
    assert status == 0
    assert "\x1b[48;" in out


def test_json_says_what_the_map_shows(run):
    status, out, _ = run("a.safetensors:2", "b.safetensors", "--json")
    first, second = map(json.loads, out.splitlines())
    assert (status, first["schema"], first["title"]) == (0, 1, "a x 2")
    (own,) = first["modules"]
    assert (own["target"], own["state"], own["reason"]) == ("proj_out", "changed", None)
    assert own["strength"] == pytest.approx(own["norm"] / 8)
    assert second["title"] == "b"
    status, out, _ = run("a.safetensors:2", "b.safetensors:-1", "--sum", "--json")
    (total,) = map(json.loads, out.splitlines())
    assert (status, total["title"]) == (0, "a x 2 + b x -1")
    apart = math.hypot(own["norm"], second["modules"][0]["norm"])
    assert total["modules"][0]["norm"] == pytest.approx(apart, rel=0.1)


def test_pictures_are_written(run, folder):
    assert run("a.safetensors", "-o", "map.svg") == (0, "map.svg: 1 map\n", "")
    ET.parse(folder / "map.svg")
    assert run("a.safetensors", "b.safetensors", "--output=map.png")[0] == 0
    with Image.open(folder / "map.png") as image:
        assert image.format == "PNG"
    status, out, err = run("a.safetensors", "-o", "map.svg")
    assert (status, out) == (74, "")
    assert "--force" in err
    assert run("a.safetensors", "-o", "map.svg", "-f")[0] == 0
    assert run("a.safetensors", "-o", "none/map.svg")[0] == 74
    assert sorted(p.suffix for p in folder.iterdir() if p.stem == "map") == [".png", ".svg"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no file is named"),
        (["a.safetensors", "-o", "map.jpg"], "does not end in .png or .svg"),
        (["a.safetensors:0"], "strength 0"),
        (["a.safetensors:0", "b.safetensors:0", "--sum"], "strength 0"),
        (["a.safetensors"] * 9, "9 maps are more"),
        (["a.safetensors", "--json", "-o", "m.svg"], "cannot be used together"),
        (["a.safetensors", "--color", "blue"], "auto, always or never"),
        (["--blocks", "0:1", "a.safetensors"], "stands behind the file"),
        (["a.safetensors", "--blocks", "what"], "has no factor"),
        (["a.safetensors", "--what"], "unknown option"),
    ],
)
def test_usage(run, args, message):
    status, out, err = run(*args)
    assert (status, out) == (64, "")
    assert message in err
    assert "hint: " in err


def test_exit_statuses(run, folder):
    assert run("bad.safetensors")[0] == 3
    assert run("none.safetensors")[0] == 3
    save_file(
        {"double_blocks.0.img_attn.qkv.lora_down.weight": torch.ones(2, 4)}, "flux.safetensors"
    )
    assert run("flux.safetensors")[0] == 2
    tensors = {
        "proj_out.lora_A.weight": torch.ones(2, 3072),
        "proj_out.lora_B.weight": torch.ones(64, 2),
    }
    save_file({**tensors, "proj_out.dora_scale": torch.ones(64, 1)}, "dora.safetensors")
    status, out, _ = run("dora.safetensors")
    assert status == 1
    assert "1 of unknown size" in out
    assert run("a.safetensors", "--sum", "b.safetensors:0")[0] == 0


def test_help(run, capfd):
    status, out, _ = run("--help")
    assert status == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    for option in ("--output", "--sum", "--blocks", "--color", "--force", "--json"):
        assert option in out
    cli.main(["--help"])
    assert "qwenlora map FILE" in capfd.readouterr().out


# ---- `qwenlora-keys --map` ----


@pytest.fixture
def keys(folder, capfd):
    def keys(*args):
        status = cli.keys_main(list(map(str, args)))
        return status, *capfd.readouterr()

    return keys


def test_keys_draw_the_map_below_the_screen(keys):
    plain = keys("a.safetensors")
    for args in (["--map", "a.safetensors"], ["a.safetensors", "--map", "--map"]):
        status, out, err = keys(*args)
        assert (status, err) == (plain[0], plain[2]) == (0, "")
        assert out.startswith(plain[1] + "\na\n1 module, median ")
    assert "\x1b[48;" in keys("--map", "--color=always", "a.safetensors")[1]


def test_keys_say_why_there_is_no_map(keys):
    status, out, err = keys("--map", "bad.safetensors", "a.safetensors")
    assert status == 3
    assert "note: no map of `bad.safetensors`: " in err
    assert "\na\n1 module" in out
    status, out, err = keys("--map", ".")
    assert status == 3
    assert "note: `.` is a folder" in err
    assert "median" not in out


def test_keys_without_screens_draw_no_map(keys):
    assert keys("--map", "--no-such")[0] == 64
    assert keys("--map", "--color=blue", "a.safetensors")[0] == 64
    status, out, _ = keys("--map", "--help")
    assert status == 0
    assert "median" not in out
    for other in ("--json", "--explain=img_in.alpha"):
        status, out, _ = keys("--map", other, "a.safetensors")
        assert (status, out) == (64, "")
    # Behind `--` it is a file's name.
    status, _, err = keys("--", "--map")
    assert status == 3
    assert "--map" in err
