"""Saved files of the nodes that ours stand in for, as every version's own frontend wrote them."""

from __future__ import annotations

import json

import pytest

from qwenlora.runtime import OPTIONS_KEY

from .test_nodes import A, B, C, bench, files, modules, pack, wanted

__all__ = ["bench", "files", "pack"]

ABC = [("a", 0.7), ("b", 0.9), ("c", 1.25)]
AC = [ABC[0], ABC[2]]
PAIRS = (A, 0.7, B, 0.9, C, 1.25)
SWITCHED = (True, A, 0.7, True, B, 0.9, True, C, 1.25)
ONE_OFF = (True, A, 0.7, False, B, 0.9, True, C, 1.25)
REST = ("None", 1.0) * 7
BUTTON = None


def dicts(*enabled):
    rows = zip((A, B, C), (0.7, 0.9, 1.25), enabled, strict=True)
    return [{"enabled": on, "lora_name": name, "lora_strength": value} for name, value, on in rows]


ON = dicts(True, True, True)
WINDOWS = C.replace("/", "\\")


def restored(node, values):
    """What a frontend without the old pack's script posts: values by position, then defaults."""
    schema = modules().registry.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
    inputs = {}
    sockets = ("model", "clip", "lora_stack")
    drawn = [*schema["required"].items(), *schema["optional"].items()]
    drawn = [(name, kind) for name, kind in drawn if name not in sockets]
    for index, (name, (kind, options)) in enumerate(drawn):
        first = kind[0] if isinstance(kind, list) else None
        inputs[name] = values[index] if index < len(values) else options.get("default", first)
    return inputs


# (node, what versions wrote it, saved values, what must be asked for)
SAVED = [
    ("QwenImageLoraLoader", "1.60", [A, 0.7], ABC[:1]),
    ("QwenImageLoraLoader", "1.63 to 2.5.2", [A, 0.7, "disable"], ABC[:1]),
    ("QwenImageLoraLoader", "2.5.7", [A, 0.7, "disable", False], ABC[:1]),
    ("QwenImageLoraLoader", "windows", [WINDOWS, 1.25, "auto"], ABC[2:]),
    ("QwenImageLoraStack", "1.60", [3, *PAIRS, *REST], ABC),
    ("QwenImageLoraStack", "1.63 to 2.5.2", [3, "disable", *PAIRS, *REST], ABC),
    ("QwenImageLoraStack", "2.5.3 to 2.5.6", [3, "disable", *PAIRS, *REST, False], ABC),
    ("QwenImageLoraStack", "1.60 two shown", [2, *PAIRS, *REST], ABC[:2]),
    ("QwenImageLoraStackV1", "2.4.0, 2.5.2", ["disable", True, True, *ON, BUTTON], ABC),
    ("QwenImageLoraStackV1", "2.5.7", ["disable", True, True, False, *ON, BUTTON], ABC),
    (
        "QwenImageLoraStackV1",
        "one off",
        ["disable", True, True, False, *dicts(True, False, True), BUTTON],
        AC,
    ),
    ("QwenImageLoraStackV1", "stack off", ["disable", True, False, False, *ON, BUTTON], []),
    ("QwenImageLoraStackV2", "2.2.5, 2.3.5", ["3", 3, "disable", *PAIRS], ABC),
    ("QwenImageLoraStackV2", "2.2.5 two shown", ["2", 2, "auto", *PAIRS[:4]], ABC[:2]),
    ("QwenImageLoraStackV2", "2.2.5 ten", ["10", 10, "enable", *PAIRS, *REST], ABC),
    ("QwenImageLoraStackV2", "2.2.5 before its script ran", [3, "disable", *PAIRS, *REST], ABC),
    ("QwenImageLoraStackV2", "2.4.0, 2.5.2", ["3", 3, "disable", False, *PAIRS], ABC),
    ("QwenImageLoraStackV2", "2.5.7", ["3", 3, "disable", False, False, *PAIRS], ABC),
    ("QwenImageLoraStackV2", "2.5.7 on", ["3", 3, "disable", True, False, *PAIRS], ABC),
    ("QwenImageLoraStackV3", "2.2.5 to 2.5.2", ["3", 3, True, "disable", *SWITCHED], ABC),
    ("QwenImageLoraStackV3", "2.5.7", ["3", 3, True, "disable", False, *SWITCHED], ABC),
    ("QwenImageLoraStackV3", "one off", ["3", 3, True, "disable", *ONE_OFF], AC),
    ("QwenImageLoraStackV3", "all off", ["3", 3, False, "disable", *ONE_OFF], AC),
    ("QwenImageLoraStackV3", "no script", [3, "disable", True, *SWITCHED], ABC),
    ("ZImageTurboLoraStackV1", "2.5.2, 2.5.7", [True, *ON, BUTTON], ABC),
    ("ZImageTurboLoraStackV1", "stack off", [False, *ON, BUTTON], []),
    ("ZImageTurboLoraStackV2", "2.2.5 to 2.5.2", ["3", 3, "disable", *PAIRS], ABC),
    ("ZImageTurboLoraStackV3", "2.2.5 to 2.5.7", ["3", 3, True, "disable", *SWITCHED], ABC),
    ("ZImageTurboLoraStackV3", "one off", ["3", 3, True, "disable", *ONE_OFF], AC),
    ("ZImageTurboLoraStackV4", "2.3.5 to 2.5.7", ["3", 3, True, *SWITCHED], ABC),
    ("ZImageTurboLoraStackV4", "one off", ["3", 3, True, *ONE_OFF], AC),
]
STACKS = sorted({node for node, *_ in SAVED if "Stack" in node})


@pytest.mark.parametrize(
    ("node", "values", "loras"),
    [pytest.param(node, values, loras, id=f"{node} {by}") for node, by, values, loras in SAVED],
)
def test_files_of_every_version_run_as_they_were_saved(bench, node, values, loras):
    node = f"Nunchaku{node}"
    (model,) = bench.models(one=[(node, restored(node, values))])
    assert wanted(model) == loras


def test_modulation_is_on_where_a_file_has_no_switch_for_it(bench):
    node = "NunchakuQwenImageLoraStackV2"
    old = restored(node, ["3", 3, "disable", *PAIRS])
    off = restored(node, ["3", 3, "disable", False, False, *PAIRS])
    for inputs, modulation in ((old, True), (off, False)):
        (model,) = bench.models(one=[(node, inputs)])
        specs = model.model_options["transformer_options"][OPTIONS_KEY].specs
        assert {spec.modulation for spec in specs} == {modulation}


# ---- the same table for the browser ----


def fits(kind, value):
    """What the contract's kinds mean, in other words than the pack's."""
    match kind:
        case "name":
            return type(value) is str
        case "strength":
            return type(value) in (int, float)
        case "count":
            return type(value) is int or (type(value) is str and value.isdecimal())
        case "offload":
            return value in ("auto", "enable", "disable")
        case "flag":
            return type(value) is bool
    raise AssertionError(kind)


def read(layout, kinds, values):
    """What the contract says that a reader does, in the simplest words."""
    field = {name: name.rstrip("0123456789").rstrip("_") for name in layout}
    rows = [name for name in layout if name[-1].isdigit()]
    head = layout[: layout.index(rows[0])]
    width = len([name for name in rows if name.endswith("_1")])
    found = {}
    for name, value in zip(head, values, strict=False):
        if not fits(kinds[field[name]], value):
            return {}
        found[name] = value
    names, rest = layout[len(head) :], values[len(head) :]
    for begin in range(0, len(rest) - width + 1, width):
        row = dict(zip(names[begin : begin + width], rest[begin : begin + width], strict=True))
        if not all(fits(kinds[field[name]], value) for name, value in row.items()):
            break
        found |= row
    return found if len(found) > len(head) else {}


@pytest.fixture
def told(host, bench):
    """What the browser is told of a stack: its layouts and kinds."""

    def ask(node):
        _, info = host.request("GET", f"/object_info/Nunchaku{node}")
        options = info[f"Nunchaku{node}"]["input"]["required"]["model"][1]
        return options["qwenlora_layouts"], options["qwenlora_kinds"]

    return ask


@pytest.mark.parametrize("node", STACKS)
def test_the_browser_is_told_the_layouts(told, node):
    layouts, kinds = told(node)
    saved = modules().registry.NODE_CLASS_MAPPINGS[f"Nunchaku{node}"].saved
    assert layouts[0] == list(saved.today.names)
    assert len({json.dumps(layout) for layout in layouts}) == len(layouts)
    fields = {name.rstrip("0123456789").rstrip("_") for layout in layouts for name in layout}
    assert set(kinds) == fields


@pytest.mark.parametrize(
    ("node", "values", "loras"),
    [
        pytest.param(node, values, loras, id=f"{node} {by}")
        for node, by, values, loras in SAVED
        if "Stack" in node and not any(isinstance(value, dict) for value in values)
    ],
)
def test_a_reader_of_the_contract_finds_the_rows(told, node, values, loras):
    layouts, kinds = told(node)
    found = max((read(layout, kinds, values) for layout in layouts), key=len)
    assert {name for name in found if name.startswith("lora_name_")}
    count = int(found.get("lora_count", 10))
    rows = [
        (found[f"lora_name_{i}"], found[f"lora_strength_{i}"])
        for i in range(1, count + 1)
        if found.get(f"enabled_{i}", True) and found.get(f"lora_name_{i}", "None") != "None"
    ]
    title = {A: "a", B: "b", C: "c"}
    assert [(title[name], strength) for name, strength in rows] == loras
