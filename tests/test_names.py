"""What the LoRAs of a stack are called."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenlora import LoraSpec
from qwenlora.names import names_of, shortest_names

WEIGHTS = "pytorch_lora_weights.safetensors"
STATE = {"x": torch.zeros(1)}


def named(*sources):
    return names_of([s if isinstance(s, LoraSpec) else LoraSpec(s) for s in sources])


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        ([f"/l/cats/{WEIGHTS}"], ["pytorch_lora_weights"]),
        (["/l/a.safetensors", "/l/b.safetensors"], ["a", "b"]),
        (
            [f"/l/cats/{WEIGHTS}", f"/l/dogs/{WEIGHTS}", "/l/a.safetensors"],
            ["cats/pytorch_lora_weights", "dogs/pytorch_lora_weights", "a"],
        ),
        # As few folders as needed, each for itself.
        (
            ["/l/a/x.safetensors", "/l/b/x.safetensors", "/l/c/b/x.safetensors"],
            ["a/x", "l/b/x", "c/b/x"],
        ),
        (
            [f"/l/{name}/checkpoint-500/{WEIGHTS}" for name in ("cats", "dogs")],
            [f"{name}/checkpoint-500/pytorch_lora_weights" for name in ("cats", "dogs")],
        ),
        (["/x.safetensors", "/a/x.safetensors"], ["/x", "a/x"]),
        # The ending alone.
        (["/l/x.safetensors", "/l/x.sft"], ["x.safetensors", "x.sft"]),
        (["/runs/v1.5", "/runs/v1.6"], ["v1.5", "v1.6"]),
        # One file, however it is spelled.
        (["/l/x.safetensors", "/l/../l/x.safetensors"], ["x (1)", "x (2)"]),
        (
            ["/l/x.safetensors", "/k/x.safetensors", "/l/x.safetensors"],
            ["l/x (1)", "k/x", "l/x (2)"],
        ),
        ([STATE], ["state dict"]),
        ([STATE, STATE, "/l/x.safetensors"], ["state dict (1)", "state dict (2)", "x"]),
        # A name that was given stays.
        ([LoraSpec("/l/a.safetensors", name="x"), "/l/x.safetensors"], ["x", "x.safetensors"]),
        ([LoraSpec(STATE, name="cats"), LoraSpec(STATE, name="dogs")], ["cats", "dogs"]),
        (
            [LoraSpec(STATE, name="x"), LoraSpec("/l/a.safetensors", name="x")],
            ["x (1)", "x (2)"],
        ),
        (
            [LoraSpec(STATE, name="x (1)"), "/l/x.safetensors", "/l/x.safetensors"],
            ["x (1)", "x (2)", "x (3)"],
        ),
        (["/l/state dict.safetensors", STATE], ["state dict.safetensors", "state dict"]),
        ([], []),
    ],
)
def test_names_tell_loras_apart(sources, names):
    assert list(named(*sources)) == names


def test_relative_paths_have_folders_too(tmp_path, monkeypatch):
    (tmp_path / "cats").mkdir()
    monkeypatch.chdir(tmp_path / "cats")
    assert named("x.safetensors", "../dogs/x.safetensors") == ("cats/x", "dogs/x")
    assert named("x.safetensors", str(tmp_path / "cats" / "x.safetensors")) == ("x (1)", "x (2)")


def test_names_of_windows():
    paths = [r"C:\loras\cats\x.safetensors", "C:/loras/dogs/x.safetensors"]
    assert shortest_names(list(map(PureWindowsPath, paths))) == ["cats/x", "dogs/x"]
    drives = [r"C:\x.safetensors", r"D:\x.safetensors"]
    assert shortest_names(list(map(PureWindowsPath, drives))) == ["C:/x", "D:/x"]
    same = [r"C:\loras\x.safetensors", "c:/LORAS/x.safetensors"]
    assert len(set(shortest_names(list(map(PureWindowsPath, same))))) == 1


def test_a_name_that_is_no_text_is_shown():
    paths = [PurePosixPath(f"/l/{folder}/x.sft") for folder in ("\udcff", "b")]
    assert shortest_names(paths) == [r"\udcff/x", "b/x"]


words = st.sampled_from(["a", "b", "x", "x (1)", "x.y"])
files = st.lists(words, min_size=1, max_size=4).map(lambda parts: f"/{'/'.join(parts)}.sft")
specs = st.builds(LoraSpec, files | st.just(STATE), name=st.none() | words)


@given(stack=st.lists(specs, max_size=6))
def test_no_two_are_alike(stack):
    names = names_of(stack)
    assert len(set(names)) == len(names) == len(stack)
    # A title that no other has is the name.
    titles = [spec.title for spec in stack]
    for name, title in zip(names, titles, strict=True):
        assert titles.count(title) > 1 or name == title or name.startswith(title)
