"""What people read: nodes and errors in every language, help pages, what the search finds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from .test_nodes import PACK, REPOSITORY, A, bench, clone, files, holding, load, modules, pack
from .write_locales import texts_of

__all__ = ["bench", "clone", "files", "pack"]

LOCALES = REPOSITORY / "locales"
OTHERS = sorted(path.name for path in LOCALES.iterdir() if path.name != "en")
WEB = PACK / "web"
HELP = WEB / "docs"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
PLACE = re.compile(r"\{\w+\}")


def words(language, file):
    return json.loads((LOCALES / language / f"{file}.json").read_text(encoding="utf-8"))


def leaves(tree, path=()):
    """Every text with the keys that lead to it."""
    if isinstance(tree, str):
        yield path, tree
    else:
        for key, value in tree.items():
            yield from leaves(value, (*path, key))


@pytest.fixture
def told(host, pack):
    """What the frontend is told of each node."""
    return {name: host.request("GET", f"/object_info/{name}")[1][name] for name in pack}


# ---- nodes ----


def test_english_is_what_the_nodes_say(told):
    """`make locales` writes it anew; what it adds needs a translation in every other language."""
    english = words("en", "nodeDefs")
    for name, info in told.items():
        assert english.get(name) == texts_of(info), name


def test_every_input_says_what_it_is_for(told):
    for name, info in told.items():
        texts = texts_of(info)
        assert texts["display_name"] != name
        assert texts["description"], name
        assert not [key for key, slot in texts["inputs"].items() if "tooltip" not in slot], name


@pytest.mark.parametrize("language", OTHERS)
@pytest.mark.parametrize("file", ["main", "nodeDefs"])
def test_languages_have_the_same_keys(language, file):
    english, other = dict(leaves(words("en", file))), dict(leaves(words(language, file)))
    assert sorted(other) == sorted(english)
    assert not [key for key, text in other.items() if not text.strip()]
    for key, text in english.items():
        if file == "main":
            assert sorted(PLACE.findall(other[key])) == sorted(PLACE.findall(text)), key


def test_chinese_is_chinese():
    texts = dict(leaves(words("zh", "nodeDefs")))
    sentences = {key: text for key, text in texts.items() if key[-1] != "name"}
    assert len(sentences) > 100
    assert not [key for key, text in sentences.items() if not CHINESE.search(text)]
    errors = words("zh", "main")["qwenlora"]["errors"]
    assert not [key for key, text in errors.items() if not CHINESE.search(text)]


def test_no_text_of_a_node_is_read_as_a_pattern():
    """The frontend compiles them: braces are places, `@` is a link, `|` parts plurals."""
    for language in ("en", *OTHERS):
        texts = dict(leaves(words(language, "nodeDefs")))
        assert not [key for key, text in texts.items() if set(text) & set("{}@|")]


def test_the_host_serves_them(host, clone):
    from app.custom_node_manager import CustomNodeManager

    shutil.copytree(LOCALES, clone / "locales")
    CustomNodeManager.build_translations.cache_clear()
    try:
        _, served = host.request("GET", "/i18n")
    finally:
        CustomNodeManager.build_translations.cache_clear()
    for language in ("en", *OTHERS):
        assert served[language]["nodeDefs"] == words(language, "nodeDefs")
        assert served[language]["qwenlora"] == words(language, "main")["qwenlora"]


# ---- help and search ----


def test_every_node_has_a_help_page_in_every_language(told):
    for name, info in told.items():
        for page in (HELP / f"{name}.md", *(HELP / name / f"{own}.md" for own in OTHERS)):
            text = page.read_text(encoding="utf-8")
            assert text.startswith("# ")
            slots = [*texts_of(info)["inputs"], *info["output_name"]]
            # Of many rows the first two are enough.
            named = {slot for slot in slots if not re.search(r"_([3-9]|10)$", slot)}
            if name == "QwenLoraStack":
                named = {re.sub(r"_\d+$", "", slot) for slot in named}
            assert not [slot for slot in named if f"`{slot}`" not in text], page
            if "zh" in page.name:
                assert CHINESE.search(text)


def test_help_pages_are_of_nodes(told):
    pages = {path.stem for path in HELP.glob("*.md")}
    assert pages >= set(told)
    assert {path.parent.name for path in HELP.glob("*/*.md")} == pages
    title = {name: info["display_name"] for name, info in told.items()}
    for name, shown in title.items():
        assert (HELP / f"{name}.md").read_text(encoding="utf-8").startswith(f"# {shown}\n")


def test_the_host_finds_the_pages(graph, clone):
    import nodes

    graph.load_pack(PACK)
    graph.load_pack(clone)
    folders = [
        nodes.EXTENSION_WEB_DIRS[name] for name in ("qwenlora_nodes", "ComfyUI-qwenlora.git")
    ]
    assert Path(folders[0]) == WEB
    assert Path(folders[1]) == clone / "comfy" / "qwenlora_nodes" / "web"
    for folder in folders:
        assert (Path(folder) / "docs" / "QwenLoraLoader.md").is_file()
        assert (Path(folder) / "docs" / "QwenLoraLoader" / "zh.md").is_file()


def test_new_nodes_are_found_by_what_people_type(pack):
    nodes = modules().registry.NODE_CLASS_MAPPINGS
    aliases = {name: getattr(node, "SEARCH_ALIASES", []) for name, node in nodes.items()}
    for name, node in nodes.items():
        assert bool(aliases[name]) == (not getattr(node, "DEPRECATED", False)), name
        assert all(alias == alias.lower().strip() for alias in aliases[name])
        assert len(set(aliases[name])) == len(aliases[name])
    assert {"load lora", "lora loader"} <= set(aliases["QwenLoraLoader"])
    assert {"power lora loader", "lora stack", "load lora"} <= set(aliases["QwenLoraStack"])


# ---- errors ----


def chain_of(bench, case):
    """The chain of nodes of a case, and the stack that is linked to it."""
    rows = {
        "near": {"loras.0.lora_name": "A"},
        "far": {"lora_name_3": "nothing alike"},
        "empty folder": {"loras.4.lora_name": A},
        "gone": {"loras.0.lora_name": A},
        "strength": {"loras.0.lora_name": A, "loras.0.strength": 101},
        "name": {"loras.0.lora_name": 3},
    }
    stacks = {"stack": 3, "entry": [(A, 1.0)], "entry's file": [("gone", 1.0, 1.0)]}
    named = {"pickle": "old", "page": "page", "flux": "flux"}
    if case in stacks:
        return [("QwenLoraStack", {"lora_stack": ["stack", 0]})], stacks[case]
    if case in rows:
        return [("QwenLoraStack", rows[case])], None
    return [load(f"{named.get(case, 'a')}.safetensors")], None


def wrapped(name):
    return holding(type(name, (torch.nn.Module,), {"__module__": "others"})())


MODELS = {
    "manager": lambda: wrapped("ComfyQwenImageWrapperLM"),
    "reference": lambda: wrapped("ComfyQwenImageWrapper"),
    "wrong model": lambda: holding(torch.nn.Linear(1, 1)),
}


def spoil(folder, case):
    """Bring about what a case is of, in the folder for LoRAs."""
    if case == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    if case == "gone":
        if os.name == "nt":
            pytest.skip("links need a right there")
        (folder / A).unlink()
        (folder / A).symlink_to(folder / "nowhere.safetensors")
    if case == "pickle":
        torch.save({"a": torch.ones(1)}, folder / "old.safetensors")
    if case == "page":
        (folder / "page.safetensors").write_text("<!DOCTYPE html><html></html>" * 9)
    if case == "flux":
        key = "transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight"
        tensors = {key.format("A"): torch.ones(4, 8), key.format("B"): torch.ones(8, 4)}
        save_file(tensors, str(folder / "flux.safetensors"))


CASES = {
    "near": {"missing", "nearest"},
    "far": {"missing", "none_alike"},
    "empty folder": {"missing", "folder_empty"},
    "gone": {"missing", "file_gone"},
    "wrong model": {"wrong_model", "load_nunchaku"},
    "manager": {"rival", "rival_manager"},
    "reference": {"rival", "rival_pack"},
    "strength": {"strength"},
    "name": {"name"},
    "stack": {"stack"},
    "entry": {"stack_entry"},
    "entry's file": {"missing", "none_alike"},
    "pickle": {"pickle"},
    "page": {"web_page"},
    "flux": {"not_applicable"},
}
MERGING = {
    "no LoRA": ({}, {"nothing_to_merge", "behind_loaders"}),
    "both": ({"rank": 4, "energy": 0.5}, {"rank_and_energy"}),
}


def told_by(bench, host, case):
    """The message of a real run that fails."""
    if case in MERGING:
        inputs, _ = MERGING[case]
        prompt = bench.prompt(sample=False)
        prompt["fails"] = bench.graph.node(
            "QwenLoraMerge", model=["model", 0], filename_prefix="x", **inputs
        )
    else:
        if case in MODELS:
            bench.sources["model"] = bench.graph.source(MODELS[case]())
        spoil(host.loras, case)
        chain, stack = chain_of(bench, case)
        prompt = bench.prompt(sample=False, one=chain)
        if stack is not None:
            prompt["stack"] = bench.graph.source(stack)
    failed = bench.graph.run(prompt)
    assert failed.status == 200, failed.node_errors
    return failed.error["exception_message"].strip()


def keys_in(text):
    """The templates of which the message is made, found by the test's own reading of them."""
    english = words("en", "main")["qwenlora"]["errors"]
    found = set()
    for line in text.splitlines():
        for key, template in english.items():
            pattern = ".+".join(map(re.escape, PLACE.split(template)))
            if re.search(rf"(^|: ){pattern}$", line):
                found.add(key)
    return found


@pytest.mark.parametrize("case", [*CASES, *MERGING])
def test_errors_are_those_that_are_translated(bench, host, case):
    text = told_by(bench, host, case)
    expected = CASES[case] if case in CASES else MERGING[case][1]
    assert keys_in(text) == expected, text
    shown = translated(text, "zh")
    english = text.splitlines()
    assert len(shown) == len(english)
    translations = [line for line, own in zip(shown, english, strict=True) if line != own]
    assert len(translations) == len(expected)
    assert all(CHINESE.search(line) for line in translations)


def test_every_translated_error_is_met_by_a_test():
    english = words("en", "main")["qwenlora"]["errors"]
    met = set().union(*CASES.values(), *(expected for _, expected in MERGING.values()))
    assert met == set(english)


def translated(text, language):
    """What the browser's part makes of a message, run by node; None where it knows no line."""
    if shutil.which("node") is None:
        pytest.skip("needs node: apt-get install nodejs")
    module = (WEB / "errors" / "translate.js").read_text(encoding="utf-8")
    script = (
        module.replace("export function", "function")
        + f"\nconst [text, en, other] = {json.dumps(arguments(text, language))};"
        + "\nconsole.log(JSON.stringify(translated(text, en, other)));"
    )
    done = subprocess.run(["node", "-e", script], capture_output=True, check=True, timeout=60)
    answer = json.loads(done.stdout)
    return None if answer is None else answer.split("\n")


def arguments(text, language):
    return [text, *(words(own, "main")["qwenlora"] for own in ("en", language))]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "loras.0.lora_name: LoRA 'x.safetensors' is in none of ComfyUI's folders for `loras`\n"
            "hint: the nearest: 'y/x.safetensors'\nand more",
            [
                "第 1 行: LoRA 'x.safetensors' 不在 ComfyUI 的任何 `loras` 文件夹中",
                "提示：最接近的是 'y/x.safetensors'",
                "and more",
            ],
        ),
        (
            "lora_name_3: the strength of '$& (a|b)' is nan: it must be a number from -100 to 100",
            ["第 3 行: '$& (a|b)' 的强度是 nan：必须是 -100 到 100 之间的数"],
        ),
        ("CUDA out of memory", None),
        ("", None),
    ],
)
def test_lines_are_translated_one_by_one(text, shown):
    assert translated(text, "zh") == shown


def test_another_packs_nodes_stay_out_of_it():
    """Only errors of our own nodes are shown."""
    pattern = re.search(r"OURS = /(.*)/;", (WEB / "errors.js").read_text(encoding="utf-8"))[1]
    ids = set(words("en", "nodeDefs"))
    assert all(re.match(pattern, name) for name in ids)
    assert not [n for n in ("KSampler", "NunchakuQwenImageDiTLoader") if re.match(pattern, n)]


def test_names_and_words_are_one_to_one():
    """What a slot is called is called so anywhere."""
    pairs = {}
    english, chinese = (dict(leaves(words(own, "nodeDefs"))) for own in ("en", "zh"))
    for key, text in english.items():
        pairs.setdefault(text, set()).add(chinese[key])
    assert {text: found for text, found in pairs.items() if len(found) > 1} == {}


def test_the_pack_without_locales_still_loads(graph, host):
    """Copied alone, without the folder beside it, it speaks English."""
    folder = host.custom_nodes / "qwenlora_nodes"
    shutil.copytree(PACK, folder)
    try:
        assert "QwenLoraLoader" in graph.load_pack(folder)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["ComfyQwenImageWrapper", "ComfyQwenImageWrapperV2"])
def test_the_reference_packs_wrappers_get_its_name(bench, kind):
    rival = modules().host.rival_of(type(kind, (), {}))
    assert rival.pack == "ComfyUI-QwenImageLoraLoader"
    assert modules().host.rival_of(SimpleNamespace) is None
