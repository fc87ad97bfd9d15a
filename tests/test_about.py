"""What is read of a file's metadata, as trainers write it and as nobody should."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlora.about import About

KOHYA = {
    "ss_output_name": "ink_v2",
    "ss_base_model_version": "qwen_image",
    "ss_resolution": "(1024, 1024)",
    "ss_training_comment": "None",
    "ss_tag_frequency": json.dumps(
        {"10_ink": {"ink style": 30, "tree": 12}, "5_more": {"tree": 9, "ink style": 4, "cat": 1}}
    ),
}
MODELSPEC = {
    "modelspec.title": "Ink",
    "modelspec.author": "Somebody",
    "modelspec.architecture": "Qwen-Image/lora",
    "modelspec.resolution": "1328x1328",
    "modelspec.description": "Draws with\nink.",
    "modelspec.license": "apache-2.0",
    "modelspec.trigger_phrase": "ink style, sketch",
}


def test_a_kohya_trainers():
    about = About.of(KOHYA)
    assert (about.title, about.base_model) == ("ink_v2", "qwen_image")
    assert about.resolution == "1024x1024"
    assert about.description == ""
    assert about.trigger_words == ()
    assert about.tags == (("ink style", 34), ("tree", 21), ("cat", 1))
    # Nobody wrote down trigger words: the most frequent tags stand in, "cat" does not.
    assert about.prompt_words == "ink style, tree"


def test_modelspec_comes_first():
    about = About.of({**KOHYA, **MODELSPEC})
    assert (about.title, about.author, about.license) == ("Ink", "Somebody", "apache-2.0")
    assert about.architecture == "Qwen-Image/lora"
    assert about.resolution == "1328x1328"
    assert about.description == "Draws with ink."
    assert about.trigger_words == ("ink style", "sketch")
    assert about.prompt_words == "ink style, sketch"
    assert list(about.lines()) == [
        "title: Ink",
        "author: Somebody",
        "base model: qwen_image",
        "architecture: Qwen-Image/lora",
        "resolution: 1328x1328",
        "license: apache-2.0",
        "trigger words: ink style, sketch",
        "tags: ink style (34), tree (21), cat (1)",
        "description: Draws with ink.",
    ]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"ss_trigger_words": "a b, c"}, ("a b", "c")),
        ({"trigger_word": "sks"}, ("sks",)),
        ({"trainedWords": '["x y", "z, w", 3, null]'}, ("x y", "z", "w")),
        ({"modelspec.trigger_phrase": "a", "ss_trigger_words": "b; a"}, ("a", "b")),
        ({"modelspec.trigger_phrase": " , None ,\n"}, ()),
        ({"trigger_words": "[not, json"}, ("[not", "json")),
    ],
)
def test_trigger_words(metadata, words):
    assert About.of(metadata).trigger_words == words


def test_tags_of_datasets():
    datasets = [{"tag_frequency": {"a": {"x": 2}}}, {"tag_frequency": {"b": {"x": 1, "y": 2}}}, 3]
    assert About.of({"ss_datasets": json.dumps(datasets)}).tags == (("x", 3), ("y", 2))


@pytest.mark.parametrize(
    "value",
    [
        "",
        "no json",
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 10_000,
        json.dumps({"a": {"x": "many", "y": -1, "z": True, "u": 1.5, "v": None, "w": 10**30}}),
        json.dumps({"a": {"x": [1], "": 3, "  ": 4}}),
        json.dumps([1, 2]),
        '{"a": {"x": NaN, "y": Infinity}}',
        "\x00\ud800",
    ],
    ids=range(10),
)
def test_hostile_tags_are_passed_over(value):
    about = About.of({"ss_tag_frequency": value, "modelspec.title": "T"})
    assert about == About(title="T")


def test_all_is_bounded():
    many = {"a": {f"tag {number} {'x' * 300}": number + 1 for number in range(50_000)}}
    metadata = {
        "ss_tag_frequency": json.dumps(many),
        "modelspec.title": "t" * 5_000_000,
        "modelspec.trigger_phrase": ",".join(f"word {number}" for number in range(500_000)),
    }
    started = time.process_time()
    about = About.of(metadata)
    assert time.process_time() - started < 5
    assert len(about.title) < 210
    assert len(about.trigger_words) <= 50
    assert len(about.tags) == 20
    assert about.tags[0][1] == 50_000
    assert all(len(line) < 20_000 for line in about.lines())


def test_nothing_drives_the_terminal():
    about = About.of({"modelspec.title": "a\x1b[2Jb\x07\u202e\ud800"})
    assert about.title == "a\ufffd[2Jb\ufffd\ufffd\ufffd"
    about.title.encode()


TEXTS = st.text() | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
).map(json.dumps)
NAMES = st.sampled_from([*KOHYA, *MODELSPEC, "ss_datasets", "trainedWords", "name"])


@given(st.dictionaries(NAMES, TEXTS))
def test_any_metadata_is_read(metadata):
    about = About.of(metadata)
    for line in about.lines():
        assert line.isprintable()
        line.encode()
    about.prompt_words.encode()
