"""Factors by block and kind: the text form, its canonical form, and the factor of a layer."""

import itertools
import json
import math
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import qwenlora
from qwenlora import _core
from qwenlora.blocks import ALL_ONES, KINDS, BlockFactors, count_blocks
from qwenlora.errors import BlockFactorsError

NUMBERS = st.floats(-3e38, 3e38) | st.sampled_from([0.0, -0.0, 1.0, 0.5, -1.0, 5e-324, 1e16])
USUAL = NUMBERS.filter(lambda number: number == 0 or abs(number) > 1e-30)
"""Numbers of which no product of a few is too small for float64."""
KNOWN_BY_MODEL = {
    model: [path for slot in slots for path in (slot["path"], *slot["parts"])]
    for model, slots in json.loads(_core.known_slots()).items()
}
"""Paths of each model's slots and modules."""
KNOWN = KNOWN_BY_MODEL["qwen-image"] + KNOWN_BY_MODEL["z-image"]


def kinds_by_name(path):
    """The kinds of a layer, by what its name says."""
    if path not in KNOWN_BY_MODEL["qwen-image"]:
        return kinds_of_z_image(path)
    kinds = set() if path.startswith("transformer_blocks.") else {"rest"}
    kinds |= {"attn"} if ".attn." in path else set()
    kinds |= {"mlp"} if "_mlp." in path else set()
    kinds |= {"mod"} if "_mod." in path else set()
    text = any(word in path for word in (".add_", "to_add_out", "norm_added", "txt_"))
    if text:
        kinds |= {"txt"}
    elif "time_text_embed" not in path:
        kinds |= {"img"}
    return kinds


def kinds_of_z_image(path):
    group = path.partition(".")[0]
    kinds = set() if group == "layers" else {"rest"}
    kinds |= {"attn"} if ".attention." in path else set()
    kinds |= {"mlp"} if ".feed_forward." in path else set()
    kinds |= {"mod"} if path.endswith("adaLN_modulation.0") else set()
    kinds |= {"img"} if group in ("noise_refiner", "all_x_embedder", "all_final_layer") else set()
    return kinds | ({"txt"} if group in ("context_refiner", "cap_embedder") else set())


def number_by_name(path):
    parts = path.split(".")
    return int(parts[1]) if parts[0] in ("transformer_blocks", "layers") else None


@st.composite
def spelled(draw, numbers=NUMBERS):
    """A text of the grammar, with the factors that it says by block and by kind."""
    edges = draw(st.lists(st.integers(0, 70), unique=True, max_size=12).map(sorted))
    pairs = list(itertools.pairwise(edges))[::2]
    blocks, kinds, entries = {}, {}, []
    space = st.sampled_from(["", " ", "\n\t"])
    for first, end in draw(st.permutations(pairs)):
        factor = draw(numbers)
        blocks |= dict.fromkeys(range(first, end), factor)
        last = end - 1
        gap = draw(space)
        name = f"{first}{gap}-{gap}{last}" if first < last or draw(st.booleans()) else f"{first}"
        entries.append((name, factor))
    for kind in draw(st.lists(st.sampled_from(sorted(KINDS)), unique=True)):
        kinds[kind] = factor = draw(numbers)
        entries.append((draw(st.sampled_from([kind, kind.upper()])), factor))
    text = ""
    for name, factor in draw(st.permutations(entries)):
        number = draw(st.sampled_from([f"{factor!r}", f"{factor:.17g}", f"{factor:+.17e}"]))
        joint = draw(st.sampled_from([",", ";"])) if text else ""
        text += f"{joint}{draw(space)}{name}{draw(space)}:{draw(space)}{number}{draw(space)}"
    return text, blocks, kinds


def expected_factor(path, blocks, kinds):
    own = [kinds.get(kind, 1.0) for kind in KINDS if kind in kinds_by_name(path)]
    own.append(blocks.get(number_by_name(path), 1.0))
    return 0.0 if 0.0 in own else math.prod(own)


@given(spelled(USUAL), st.lists(st.sampled_from(KNOWN), min_size=1, max_size=20))
def test_a_text_says_the_factor_of_every_layer(given_text, paths):
    text, blocks, kinds = given_text
    factors = BlockFactors.parse(text)
    for path in paths:
        assert factors.factor(path) == pytest.approx(
            expected_factor(path, blocks, kinds), rel=1e-15
        )
        assert math.copysign(1, factors.factor(path)) == 1 or factors.factor(path) < 0
    off = [at for at, path in enumerate(paths) if expected_factor(path, blocks, kinds) == 0]
    assert factors.zeros(paths) == off


@given(spelled())
def test_the_canonical_text_says_the_same(given_text):
    text, blocks, kinds = given_text
    factors = BlockFactors.parse(text)
    again = BlockFactors.parse(str(factors))
    assert again == factors
    assert hash(again) == hash(factors)
    assert str(again) == str(factors)
    assert BlockFactors.build(blocks=blocks, kinds=kinds) == factors
    assert pickle.loads(pickle.dumps(factors)) == factors
    assert bool(factors) == any(factor != 1 for factor in (*blocks.values(), *kinds.values()))
    assert factors.has_zero == (0 in (*blocks.values(), *kinds.values()))


@given(st.text() | st.text("0123456789-:;, .eE+modattnrest\n", max_size=60))
@example("0:" + "9" * 10_000)
@example("9" * 10_000 + ":1")
@example("0:1e999")
@example("0:nan")
@example("0:inf")
@example("\u0663:1")
@example("0:\u0663")
@example("0:1_0")
def test_any_other_text_is_refused_at_its_place(text):
    factors, error = parsed(text)
    if error is not None:
        assert text[error.position : error.position + len(error.part)] == error.part
        assert f"at character {error.position + 1} " in str(error)
        assert "\nhint: " in str(error)
        assert len(str(error)) < 500
    else:
        assert BlockFactors.parse(str(factors)) == factors
        assert all(math.isfinite(row[-1]) for row in (*factors.blocks, *factors.kinds))


def parsed(text):
    try:
        return BlockFactors.parse(text), None
    except BlockFactorsError as error:
        return None, error


@pytest.mark.parametrize(
    ("text", "part", "position", "words"),
    [
        ("0-19:1, 10:0.5", "10", 8, "overlaps `0-19`"),
        ("10:0.5; 0-19:1", "0-19", 8, "overlaps `10`"),
        ("3:1, 3:1", "3", 5, "overlaps `3`"),
        ("mod:0; attn:1, MOD:1", "MOD", 15, "named twice"),
        ("0-19:1,, 20:0", "", 7, "empty entry"),
        ("0-19:1,", "", 7, "empty entry"),
        ("0-19", "0-19", 0, "has no factor"),
        ("0-19:", "", 5, "is no factor"),
        ("0-19:nan", "nan", 5, "is no factor"),
        ("0-19:-inf", "-inf", 5, "is no factor"),
        ("0-19:1e39", "1e39", 5, "too large"),
        ("0-19: 1:2", "1:2", 6, "is no factor"),
        ("19-0:1", "19-0", 0, "ends before it begins"),
        ("0-10000:1", "0-10000", 0, "no model has"),
        ("0--3:1", "0--3", 0, "no block and no range"),
        ("-3:1", "-3", 0, "neither a block nor a kind"),
        ("0:1; ff:0", "ff", 5, "neither a block nor a kind"),
        (":1", "", 0, "neither a block nor a kind"),
    ],
)
def test_an_error_names_the_part_and_the_way_out(text, part, position, words):
    with pytest.raises(BlockFactorsError, match="hint: ") as caught:
        BlockFactors.parse(text)
    error = caught.value
    assert (error.part, error.position) == (part, position)
    assert words in str(error)
    assert isinstance(error, ValueError)
    assert isinstance(error, qwenlora.QwenLoraError)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.part, again.position) == (str(error), part, position)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        (" ;\n; ", ""),
        ("0-59:1; mod:1.0", ""),
        ("0-19:1, 20-39:0.5, 40-59:0; mod:0", "20-39:0.5, 40-59:0; mod:0"),
        ("rest:2, 5:.5, 4:5e-1; TXT : -1", "4-5:0.5; txt:-1, rest:2"),
        ("03:-0", "3:0"),
        ("7-7:1e-7", "7:1e-07"),
    ],
)
def test_canonical_texts(text, canonical):
    assert str(BlockFactors.parse(text)) == canonical


def test_forms_of_a_value():
    text = "3:0.5; mlp:0"
    factors = BlockFactors.parse(text)
    assert BlockFactors.of(text) == BlockFactors.of(factors) == factors
    assert BlockFactors.of(None) == BlockFactors.of("0-59:1") == ALL_ONES
    assert qwenlora.BlockFactors is BlockFactors
    with pytest.raises(TypeError, match="not dict"):
        BlockFactors.of({3: 0.5})
    for wrong in ({"blocks": {-1: 1.0}}, {"blocks": {3: math.nan}}, {"kinds": {"ff": 0.0}}):
        with pytest.raises(BlockFactorsError):
            BlockFactors.build(**wrong)


def test_every_layer_of_a_model_has_the_kinds_that_its_name_says():
    for path in KNOWN:
        number, kinds = _core.layer_kinds(path)
        assert (number, set(kinds)) == (number_by_name(path), kinds_by_name(path)), path
        assert set(kinds) <= KINDS.keys()
    counts = {model: count_blocks(paths) for model, paths in KNOWN_BY_MODEL.items()}
    assert counts == {"qwen-image": 60, "z-image": 30}
    assert count_blocks(["img_in", "no.such.layer"]) == 0
    assert _core.layer_kinds("transformer_blocks.60.attn.to_q") is None
    assert BlockFactors.parse("60:0; attn:0").factor("transformer_blocks.60.attn.to_q") == 1


def test_blocks_of_other_kinds_are_counted_by_none():
    factors = BlockFactors.parse("1:0.5; rest:3, txt:2")
    assert factors.factor("layers.1.attention.to_q") == 0.5
    assert factors.factor("noise_refiner.1.attention.to_q") == 3
    assert factors.factor("context_refiner.1.attention.to_qkv") == 6


@pytest.mark.parametrize(
    ("text", "count", "outside"),
    [
        ("0-59:0.5", 60, ""),
        ("0-60:0.5", 60, "`blocks` names 60, but the model has the blocks 0 to 59"),
        (
            "0-79:0.5, 90:0; mod:0",
            60,
            "`blocks` names 60-79, 90, but the model has the blocks 0 to 59",
        ),
        ("2:0", 0, "`blocks` names 2, but the model has no numbered blocks"),
        ("mod:0", 0, ""),
        ("0-59:1", 2, ""),
    ],
)
def test_blocks_that_a_model_lacks(text, count, outside):
    assert BlockFactors.parse(text).outside(count) == outside
