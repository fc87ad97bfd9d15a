"""NaN and infinity are found by us: no library of linear algebra gets to see, and print, them."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

import qwenlora
from qwenlora import ComposeOptions
from qwenlora.delta import decomposition
from qwenlora.delta.compress import LowRankSum, decomposed
from qwenlora.errors import NonFiniteError
from qwenlora.merge.cut import Cut

from .test_merge import merged, tiny  # noqa: F401

BLOCK = "transformer_blocks.0"
MLP = f"{BLOCK}.img_mlp.net.0.proj"
BAD = [float("nan"), float("inf")]
EVERYTHING = {"max_energy_lost": 1.0, "truncated_rank": 16}


@pytest.fixture
def silent(capfd):
    """Whatever the test does, nothing is written to the process's own standard streams."""
    yield
    library = ctypes.cdll.ucrtbase if sys.platform == "win32" else ctypes.CDLL(None)
    library.fflush(None)
    assert capfd.readouterr() == ("", "")


def pair(draft) -> None:
    draft.put(MLP, "down", 40, 128).put(MLP, "up", 512, 40)


def full(draft) -> None:
    draft.put(MLP, "diff", 512, 128)


def loha(draft) -> None:
    for name in ("hada_w1", "hada_w2"):
        draft.put(MLP, f"{name}_a", 512, 24).put(MLP, f"{name}_b", 24, 128)


def lokr(draft) -> None:
    draft.put(MLP, "lokr_w1", 4, 4).put(MLP, "lokr_w2", 128, 32)


def lokr_of_halves(draft) -> None:
    draft.put(MLP, "lokr_w1_a", 4, 2).put(MLP, "lokr_w1_b", 2, 4)
    draft.put(MLP, "lokr_w2_a", 128, 8).put(MLP, "lokr_w2_b", 8, 32)


def tucker(draft) -> None:
    pair(draft)
    draft.put(MLP, "lora_mid.weight", 40, 40)


KINDS = [pair, full, loha, lokr, lokr_of_halves, tucker]


def damaged(Draft, kind, bad: float):
    """LoRAs of which one tensor holds a bad value, each tensor in its turn."""
    draft = Draft(1)
    kind(draft)
    for key in draft.tensors:
        tensors = {name: tensor.clone() for name, tensor in draft.tensors.items()}
        tensors[key].view(-1)[3] = bad
        yield tensors


@pytest.mark.slow
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("kind", "max_rank"),
    # An exact stack of plain pairs is not decomposed; tests/test_refusals.py has it.
    [(kind, rank) for kind in KINDS for rank in (None, 8, "auto") if (kind, rank) != (pair, None)],
)
def test_composing(kind, max_rank, bad, make_model, Draft, probe, silent):
    model = make_model(rank=912)
    before = probe.snapshot(model)
    healthy = Draft(2)
    pair(healthy)
    options = ComposeOptions(**EVERYTHING)
    for tensors in damaged(Draft, kind, bad):
        for stack in ([tensors], [healthy.tensors, (tensors, -0.5)]):
            with pytest.raises(NonFiniteError, match=MLP):
                qwenlora.compose_loras(model, stack, max_rank=max_rank, options=options)
    assert probe.snapshot(model).differences(before) == []


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "cut", [None, Cut(rank=4), Cut(energy=0.5)], ids=["exact", "rank", "share"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_merging(kind, cut, bad, Draft, merged, silent):  # noqa: F811
    for tensors in damaged(Draft, kind, bad):
        with pytest.raises(NonFiniteError, match=r"a tensor of `source-\d` holds NaN or infinity"):
            merged((tensors, 2.0), cut=cut)


@pytest.mark.parametrize("kind", [full, loha])
def test_what_overflows_while_it_is_decomposed_is_too_large(kind, make_model, Draft, silent):
    """Every value is finite; their squares are not."""
    draft = Draft(1)
    kind(draft)
    for tensor in draft.tensors.values():
        tensor.mul_(1e30 if kind is full else 1e10)
    model = make_model(rank=912)
    options = ComposeOptions(**EVERYTHING)
    if kind is full:
        qwenlora.compose_loras(model, draft.tensors, options=options)
        return
    with pytest.raises(NonFiniteError, match="its loha is too large"):
        qwenlora.compose_loras(model, draft.tensors, options=options)


def test_a_sum_that_overflows_is_too_large(model, Draft, silent):
    stack = []
    for seed in (1, 2):
        draft = Draft(seed)
        pair(draft)
        stack.append({key: tensor * 1e21 for key, tensor in draft.tensors.items()})
    with pytest.raises(NonFiniteError, match="its deltas are too large to sum"):
        qwenlora.compose_loras(model, stack, max_rank=8)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("shape", [(8, 8), (300, 200)])
@pytest.mark.parametrize("name", ["singular", "eigenvectors", "triangular", "orthonormal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_decomposition_judges_first(name, shape, bad, dtype, silent):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    matrix[1, 2] = bad
    with pytest.raises(torch.linalg.LinAlgError, match="NaN or infinity"):
        getattr(decomposition, name)(matrix)


@pytest.mark.parametrize("bad", BAD)
def test_sums_judge_first(bad, silent):
    down, up = torch.randn(8, 16), torch.randn(12, 8)
    up[3, 3] = bad
    with pytest.raises(torch.linalg.LinAlgError, match="NaN or infinity"):
        decomposed(LowRankSum.of([(down, up)]))
