"""On a CUDA device: Z-Image of the software that loads 4-bit ones, over Nunchaku's kernels.

The classes are Nunchaku's and nunchaku-lite's own, from sources that the caller names, and
diffusers'. The kernels are those of Nunchaku's extension, built for the device.
"""

from __future__ import annotations

import copy
import importlib
import math
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import qwenlora
from qwenlora import emulation
from qwenlora.emulation import Precision, ZImageForm
from qwenlora.emulation.fused_qkv import EPSILON, HEAD_DIM
from qwenlora.emulation.lite_layers import layers_over
from qwenlora.packing.rotation import unpack_rotations

from .nunchaku_sources import PACKAGES, RANK, WARNINGS, sources
from .test_gpu import BOUND, Pair, record, relative, write
from .test_gpu_lite import operators
from .test_nunchaku_z_image import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Change = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
    """From a layer's plain output and an activation to what an adapter adds, in float64."""

pytestmark = [pytest.mark.gpu, *WARNINGS]
pytest.importorskip("diffusers.quantizers.nunchaku", reason="needs diffusers 0.40")

DEVICE = "cuda"
DTYPE = torch.bfloat16
WIDTH, HIDDEN, TIME = 384, 1024, 256
TOKENS = 320
"""No whole number of the kernel's rows."""
STRENGTH = 0.7
SHARE_BOUND = 0.1
"""How far the share of a change that arrives is from 1 in one MLP (measured: 0.023)."""
NOISE_BOUND = 1.5
"""Difference to an oracle, relative to that of two oracles which round otherwise (measured: 1.03).

A layer rounds what it gets to 4 bits. So the last bit of one output moves whole steps of the next.
"""

QKV = ("attention.to_q", "attention.to_k", "attention.to_v")
GATED = ("feed_forward.w3", "feed_forward.w1")
OUT, BACK, MODULATION = "attention.to_out.0", "feed_forward.w2", "adaLN_modulation.0"
SIZES = {
    **dict.fromkeys((*QKV, OUT), (WIDTH, WIDTH)),
    **dict.fromkeys(GATED, (HIDDEN, WIDTH)),
    BACK: (WIDTH, HIDDEN),
    MODULATION: (4 * WIDTH, TIME),
}
"""(out, in) of a block's linears."""
RANKS = dict(zip(SIZES, (16, 24, 64, 128, 32, 20, 48, 16), strict=True))
BLOCKS = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
_NUNCHAKU_MLP = {"feed_forward.net.0.proj": GATED, "feed_forward.net.2": (BACK,)}
CALLED = {
    ZImageForm.CALLED: {"attention.to_qkv": QKV, OUT: (OUT,), **_NUNCHAKU_MLP},
    ZImageForm.FUSED: {OUT: (OUT,), **_NUNCHAKU_MLP},
    ZImageForm.PASSED: {OUT: (OUT,), **_NUNCHAKU_MLP},
    ZImageForm.STOCK: {name: (name,) for name in SIZES if name != MODULATION},
}
"""A block's layers that its forward calls, and the dense linears whose rows each has, in order."""


class Stock:
    """diffusers' own classes."""

    form = ZImageForm.STOCK

    def __init__(self, native: Any) -> None:
        self._layers = layers_over(operators(native), name="nunchaku")

    def model(self, dense: Any, state: dict[str, Tensor], *, quantized_refiners: bool) -> Any:
        assert quantized_refiners
        model = nn.Module.to(copy.deepcopy(dense), DTYPE)
        targets = [f"{block}.{name}" for block in BLOCKS for name in CALLED[self.form]]
        config = {"precision": "int4", "group_size": 64, "rank": RANK, "targets": targets}
        self._layers.replace_with_nunchaku_linear(model, {"svdq_w4a4": config}, DTYPE)
        for target in targets:
            model.get_submodule(target).to_empty(device="cpu")
        model.load_state_dict(state)
        return model.eval().requires_grad_(False)

    def run(self, model: Any, *args: Any) -> Tensor:
        return model(*args, return_dict=False)[0][0]

    def rotations(self, model: Any) -> Any:
        return nullcontext()


@pytest.fixture(scope="module")
def native() -> Any:
    try:
        return importlib.import_module("nunchaku._C").ops
    except ImportError as error:
        pytest.skip(f"needs Nunchaku's kernels (the PyPI package is another one): {error}")


@pytest.fixture(scope="module", params=[None, *PACKAGES], ids=lambda path: path and path.name)
def host(request: pytest.FixtureRequest, native: Any) -> Iterator[Any]:
    if request.param is None:
        yield Stock(native)
        return
    with sources(request.param, native):
        yield Peer(request.param, native)


@pytest.fixture(scope="module")
def dense() -> Any:
    return emulation.tiny_z_image()


@pytest.fixture(scope="module")
def loaded(host: Any, dense: Any) -> Any:
    # Files have the names of the form that is called, diffusers' apart.
    form = ZImageForm.STOCK if host.form is ZImageForm.STOCK else ZImageForm.CALLED
    state = emulation.z_image_transformer(
        dense, form=form, rank=RANK, precision=Precision.W4A4, dtype=DTYPE
    ).state_dict()
    # As a host does: nodes run in inference mode, so a loaded model's tensors are of that mode.
    with torch.inference_mode():
        return nn.Module.to(host.model(dense, state, quantized_refiners=True), DEVICE)


@pytest.fixture
def model(loaded: Any) -> Iterator[Any]:
    with torch.inference_mode():
        yield loaded
    qwenlora.reset_loras(loaded)


def delta(out: int, inp: int, rank: int, seed: int, *, size: float = 1.0) -> Pair:
    """A delta whose output is `size` times its input."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inp, generator=generator) / math.sqrt(inp)
    up = torch.randn(out, rank, generator=generator) * 2 * size / math.sqrt(rank)
    return Pair(down.bfloat16(), up.bfloat16(), 0.5)


def block_deltas(seed: int, *, size: float = 2.0) -> dict[str, Pair]:
    """Deltas of all linears of all blocks, by their paths in the dense model."""
    found = {}
    for at, block in enumerate(BLOCKS):
        for number, (name, (out, inp)) in enumerate(SIZES.items()):
            if name != MODULATION or block != "context_refiner.0":
                pair = delta(out, inp, RANKS[name], seed + 100 * at + number, size=size)
                found[f"{block}.{name}"] = pair
    return found


def save(path: Path, pairs: dict[str, Pair]) -> Path:
    return write(path, {f"diffusion_model.{name}": pair for name, pair in pairs.items()})


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    return block_deltas(0)


@pytest.fixture(scope="module")
def file(pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("z") / "all.safetensors", pairs)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, DTYPE)


def terms(pairs: dict[str, Pair], block: str, names: tuple[str, ...], x: Tensor) -> Tensor:
    """The outputs of deltas in float64, one behind the other; zeros where there is none."""
    found = []
    for name in names:
        pair = pairs.get(f"{block}.{name}")
        blank = x.new_zeros((*x.shape[:-1], SIZES[name][0]), dtype=torch.float64)
        found.append(blank if pair is None else pair.apply(x))
    return torch.cat(found, dim=-1)


# ---- layers ----


def test_each_layer_gains_its_delta(
    host: Any, model: Any, pairs: dict[str, Pair], file: Path
) -> None:
    layers = {**CALLED[host.form], MODULATION: (MODULATION,)}
    places = {
        f"{block}.{slot}": (block, names)
        for block in BLOCKS
        for slot, names in layers.items()
        if f"{block}.{names[0]}" in pairs
    }
    inputs = {}
    for path, (_, names) in places.items():
        shape = (2, TIME) if names == (MODULATION,) else (1, TOKENS, SIZES[names[0]][1])
        inputs[path] = random(*shape, seed=len(inputs))
    base = {path: model.get_submodule(path)(x).clone() for path, x in inputs.items()}
    report = qwenlora.compose_loras(model, (file, STRENGTH))
    assert report.complete
    errors: dict[str, float] = {}
    for path, x in inputs.items():
        block, names = places[path]
        found = model.get_submodule(path)(x).double() - base[path].double()
        error = relative(found, terms(pairs, block, names, x) * STRENGTH)
        if names == GATED:
            other = relative(found, terms(pairs, block, names[::-1], x) * STRENGTH)
            assert other > 1
        slot = path.removeprefix(f"{block}.")
        errors[slot] = max(error, errors.get(slot, 0))
    record(f"Z-Image, {host.form.value}, layers", **errors)
    assert max(errors.values()) < BOUND


# ---- query, key and value as attention gets them ----


class Projection:
    """An attention's query, key and value.

    Attributes:
        plain: From an activation to all three, before norms and rotation, by the kernels.
        turned: From an activation and rotations to what attention gets, by the host's own code.
        norms: Weights of the query's norm and the key's, as they are when asked.
    """

    def __init__(
        self,
        plain: Callable[[Tensor], Tensor],
        turned: Callable[[Tensor, Tensor], Tensor],
        norms: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        self.plain = plain
        self.turned = turned
        self.norms = norms


def projections(host: Any, model: Any) -> dict[str, Projection]:
    """Those of all blocks."""
    made = {
        ZImageForm.FUSED: _of_fused_module,
        ZImageForm.PASSED: _of_passed,
        ZImageForm.CALLED: _of_called,
        ZImageForm.STOCK: _of_called,
    }[host.form]
    return {block: made(host, model.get_submodule(f"{block}.attention")) for block in BLOCKS}


def _of_fused_module(host: Any, attention: Any) -> Projection:
    fused = attention.fused_module
    linear = importlib.import_module("nunchaku.models.linear")

    def plain(x: Tensor) -> Tensor:
        layer = linear.SVDQW4A4Linear(WIDTH, 3 * WIDTH, bias=False, torch_dtype=DTYPE)
        for name in [name for name, _ in layer.named_parameters()]:
            setattr(layer, name, getattr(fused, f"qkv_{name}"))
        return layer(x)

    def turned(x: Tensor, freqs: Tensor) -> Tensor:
        hook = host.module.NunchakuZImageRopeHook()
        return fused(x, hook(attention, (), {"freqs_cis": freqs})[1]["freqs_cis"])

    return Projection(plain, turned, lambda: (fused.norm_q_weight, fused.norm_k_weight))


def _norms(attention: Any) -> tuple[Tensor, Tensor]:
    return attention.norm_q.weight, attention.norm_k.weight


def _of_passed(host: Any, attention: Any) -> Projection:
    def turned(x: Tensor, freqs: Tensor) -> Tensor:
        packed, attend = (
            host.module._pack_z_image_rotary_emb(freqs),
            functional.scaled_dot_product_attention,
        )
        taken: list[Tensor] = []

        def take(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            taken.extend((query, key, value))
            return attend(query, key, value, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "scaled_dot_product_attention", take)
            attention(x, freqs_cis=packed)
        return torch.stack([part.transpose(1, 2) for part in taken], dim=2).flatten(2)

    return Projection(attention.to_qkv, turned, lambda: _norms(attention))


def _of_called(host: Any, attention: Any) -> Projection:
    def plain(x: Tensor) -> Tensor:
        if host.form is ZImageForm.CALLED:
            return attention.to_qkv(x)
        return torch.cat([getattr(attention, name)(x) for name in ("to_q", "to_k", "to_v")], dim=-1)

    def turned(x: Tensor, freqs: Tensor) -> Tensor:
        """What the processor does before it attends."""
        query, key, value = plain(x).unflatten(-1, (3, -1, HEAD_DIM)).unbind(2)
        normed = attention.norm_q(query), attention.norm_k(key)
        return torch.stack([*(_rotated(part, freqs) for part in normed), value], 2).flatten(2)

    return Projection(plain, turned, lambda: _norms(attention))


def _rotated(x: Tensor, freqs: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * freqs[:, :, None]).flatten(-2).to(x.dtype)


def rotations(tokens: int) -> Tensor:
    """(1, S, 64) complex64."""
    angles = torch.rand(1, tokens, HEAD_DIM // 2, generator=torch.Generator().manual_seed(2))
    return torch.polar(torch.ones_like(angles), 6.3 * angles).to(DEVICE)


def reference(plain: Tensor, norms: tuple[Tensor, Tensor], freqs: Tensor) -> Tensor:
    """Norms and rotation in float64: (B, S, 3C) to the same."""
    query, key, value = plain.double().unflatten(-1, (3, -1, HEAD_DIM)).unbind(2)
    turned = []
    for part, weight in zip((query, key), norms, strict=True):
        root = (part.square().mean(dim=-1, keepdim=True) + EPSILON).sqrt()
        turned.append(_rotated(part / root * weight.double(), freqs.to(torch.complex128)))
    return torch.stack([*turned, value], dim=2).flatten(2)


def split(qkv: Tensor) -> dict[str, Tensor]:
    return dict(zip(("query", "key", "value"), qkv.chunk(3, dim=-1), strict=True))


def still(found: Tensor, base: Tensor) -> bool:
    """Tell if rows that nothing trains stayed: the base's low ranks add up in any order."""
    return float(found.norm()) < 1e-3 * float(base.norm())


def test_query_key_and_value_gain_their_deltas(
    host: Any, model: Any, pairs: dict[str, Pair], file: Path
) -> None:
    freqs, errors, of_base = rotations(TOKENS), {}, 0.0
    blocks = projections(host, model)
    inputs = {block: random(1, TOKENS, WIDTH, seed=at) for at, block in enumerate(blocks)}
    plain = {block: own.plain(inputs[block]).double() for block, own in blocks.items()}
    base = {block: own.turned(inputs[block], freqs).clone() for block, own in blocks.items()}
    qwenlora.compose_loras(model, (file, STRENGTH))
    for block, own in blocks.items():
        x, norms = inputs[block], own.norms()
        before = reference(plain[block], norms, freqs)
        of_base = max(of_base, relative(base[block], before))
        after = reference(plain[block] + terms(pairs, block, QKV, x) * STRENGTH, norms, freqs)
        found = split(own.turned(x, freqs).double() - base[block].double())
        for name, expected in split(after - before).items():
            errors[name] = max(relative(found[name], expected), errors.get(name, 0))
    record(f"Z-Image, {host.form.value}, normed and rotated", **errors, base_output=of_base)
    assert of_base < BOUND
    assert max(errors.values()) < BOUND


def test_a_file_without_a_key(host: Any, model: Any, tmp_path: Path) -> None:
    block, freqs, x = "layers.1", rotations(TOKENS), random(1, TOKENS, WIDTH)
    pairs = {f"{block}.{name}": delta(WIDTH, WIDTH, 20, 5) for name in (QKV[0], QKV[2])}
    own = projections(host, model)[block]
    plain, base = own.plain(x).double(), own.turned(x, freqs).double()
    qwenlora.compose_loras(model, save(tmp_path / "qv.safetensors", pairs))
    after = reference(plain + terms(pairs, block, QKV, x), own.norms(), freqs)
    expected = split(after - reference(plain, own.norms(), freqs))
    found = split(own.turned(x, freqs).double() - base)
    assert still(found.pop("key"), split(base)["key"])
    assert all(relative(found[name], expected[name]) < BOUND for name in found)


def test_norms_gain_what_a_file_stores(host: Any, model: Any, tmp_path: Path) -> None:
    block, freqs, x = "layers.0", rotations(TOKENS), random(1, TOKENS, WIDTH)
    generator = torch.Generator().manual_seed(9)
    stored = {name: torch.randn(HEAD_DIM, generator=generator) for name in ("norm_q", "norm_k")}
    path = tmp_path / "norms.safetensors"
    save_file({f"diffusion_model.{block}.attention.{n}.diff": t for n, t in stored.items()}, path)
    own = projections(host, model)[block]
    plain, base = own.plain(x), own.turned(x, freqs).double()
    weights = tuple(weight.clone() for weight in own.norms())
    assert qwenlora.compose_loras(model, (path, STRENGTH)).complete
    both = zip(weights, stored.values(), strict=True)
    wanted = tuple(w.double() + STRENGTH * t.to(w.device).double() for w, t in both)
    expected = split(reference(plain, wanted, freqs) - reference(plain, weights, freqs))
    found = split(own.turned(x, freqs).double() - base)
    assert still(found.pop("value"), split(base)["value"])
    errors = {name: relative(found[name], expected[name]) for name in found}
    record(f"Z-Image, {host.form.value}, norm_q.diff and norm_k.diff", **errors)
    assert max(errors.values()) < BOUND


def test_a_whole_lokr_beside_the_layers(host: Any, model: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    names = {OUT: (16, 16), "feed_forward.w2": (16, 32)}
    tensors, products = {}, {}
    for name, (rows, columns) in names.items():
        out, inp = SIZES[name]
        w1 = (torch.randn(rows, columns, generator=generator) / math.sqrt(columns)).bfloat16()
        w2 = torch.randn(out // rows, inp // columns, generator=generator).bfloat16()
        stem = f"diffusion_model.layers.0.{name}"
        tensors |= {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2 / 4}
        products[name] = torch.kron(w1.double(), (w2 / 4).double()).to(DEVICE)
    path = tmp_path / "lokr.safetensors"
    save_file(tensors, path)
    slots = {parts: slot for slot, parts in CALLED[host.form].items()}
    layers = {name: model.get_submodule(f"layers.0.{slots[(name,)]}") for name in names}
    inputs = {name: random(1, TOKENS, SIZES[name][1]) for name in names}
    base = {name: layer(inputs[name]).clone() for name, layer in layers.items()}
    report = qwenlora.compose_loras(model, path)
    assert not report.energy_lost
    errors = {}
    for name, layer in layers.items():
        found = layer(inputs[name]).double() - base[name].double()
        errors[name] = relative(found, inputs[name].double() @ products[name].mT)
    record(f"Z-Image, {host.form.value}, LoKr of whole factors", **errors)
    assert max(errors.values()) < BOUND


KEY = "attention.to_k"
KEY_BLOCK = 16
"""Rows of one rotation."""


def _lokr(generator: torch.Generator) -> tuple[dict[str, Tensor], Change]:
    w1 = torch.randn(16, 16, generator=generator) / 4
    w2 = torch.randn(WIDTH // 16, WIDTH // 16, generator=generator) / 8
    product = torch.kron(w1.double(), w2.double()).to(DEVICE)
    return {"lokr_w1": w1, "lokr_w2": w2}, lambda plain, x: x.double() @ product.mT


def _rows(generator: torch.Generator) -> tuple[dict[str, Tensor], Change]:
    factors = torch.randn(WIDTH, generator=generator) / 2
    stored = {"weight": factors[:, None], "on_input": torch.tensor(data=False)}
    return stored, lambda plain, x: plain(x).double() * factors.double().to(DEVICE)


def _columns(generator: torch.Generator) -> tuple[dict[str, Tensor], Change]:
    # Halves and doubles are exact, so no value lands on another of the kernel's 4-bit steps.
    factors = torch.tensor([-0.5, 0.0, 1.0])[torch.randint(3, (WIDTH,), generator=generator)]
    stored = {"weight": factors[None], "on_input": torch.tensor(data=True)}

    def change(plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        changed = x.double() * (1 + factors.double().to(DEVICE))
        return plain(changed.to(DTYPE)).double() - plain(x).double()

    return stored, change


def _rotation(generator: torch.Generator) -> tuple[dict[str, Tensor], Change]:
    shape = (WIDTH // KEY_BLOCK, KEY_BLOCK, KEY_BLOCK)
    blocks = torch.randn(shape, generator=generator) / 8
    skew = (blocks - blocks.mT).double().to(DEVICE)
    one = torch.eye(KEY_BLOCK, dtype=torch.float64, device=DEVICE)
    turns = torch.linalg.solve(one - skew, one + skew, left=False)

    def change(plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = plain(x).double()
        # Each block of rows times R^T.
        turned = torch.einsum("...nj,nji->...ni", y.unflatten(-1, shape[:2]), turns)
        return turned.flatten(-2) - y

    return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, change


@pytest.mark.parametrize("kind", [_lokr, _rows, _columns, _rotation])
def test_a_key_with_something_beside_it(
    host: Any, model: Any, pairs: dict[str, Pair], file: Path, tmp_path: Path, kind: Any
) -> None:
    """Beside low ranks of all three: the kernel that norms and rotates is opened."""
    block, freqs, x = "layers.1", rotations(TOKENS), random(1, TOKENS, WIDTH)
    stored, change = kind(torch.Generator().manual_seed(21))
    path = tmp_path / "key.safetensors"
    save_file(
        {f"lycoris_{block}_{KEY}".replace(".", "_") + f".{k}": t for k, t in stored.items()}, path
    )
    own = projections(host, model)[block]
    plain, base = own.plain(x).double(), own.turned(x, freqs).clone()
    wanted = plain + terms(pairs, block, QKV, x) * STRENGTH
    wanted[..., WIDTH : 2 * WIDTH] += change(lambda x: own.plain(x)[..., WIDTH : 2 * WIDTH], x)
    norms = own.norms()
    expected = split(reference(wanted, norms, freqs) - reference(plain, norms, freqs))
    assert qwenlora.compose_loras(model, [(file, STRENGTH), path]).complete
    found = split(own.turned(x, freqs).double() - base.double())
    errors = {name: relative(found[name], expected[name]) for name in found}
    record(f"Z-Image, {host.form.value}, key{kind.__name__}", **errors)
    assert max(errors.values()) < BOUND
    qwenlora.reset_loras(model)
    assert still(own.turned(x, freqs).double() - base.double(), base.double())


# ---- strengths, sets, reset ----


def layer_error(host: Any, model: Any, pairs: dict[str, Pair], base: Tensor, by: float) -> float:
    """Of one block's query, key and value before any norm, relative to the wanted delta."""
    block, x = "layers.0", random(1, TOKENS, WIDTH)
    found = projections(host, model)[block].plain(x).double() - base.double()
    return relative(found, terms(pairs, block, QKV, x) * by)


def test_a_strength_changes_in_place(
    host: Any, model: Any, pairs: dict[str, Pair], file: Path, rescalings: list[object]
) -> None:
    base = projections(host, model)["layers.0"].plain(random(1, TOKENS, WIDTH)).clone()
    qwenlora.compose_loras(model, (file, STRENGTH))
    places = {name: own.data_ptr() for name, own in model.named_parameters()}
    errors = []
    for by in (-0.3, 1.1):
        qwenlora.compose_loras(model, (file, by))
        errors.append(layer_error(host, model, pairs, base, by))
    assert len(rescalings) == 2
    assert places == {name: own.data_ptr() for name, own in model.named_parameters()}
    record(f"Z-Image, {host.form.value}, strengths in place", worst=max(errors))
    assert max(errors) < BOUND


def test_a_kept_set_comes_back(host: Any, model: Any, file: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other.safetensors", block_deltas(7000))
    qwenlora.compose_loras(model, file)
    first = values(model)
    qwenlora.compose_loras(model, other)
    assert not same(first, values(model))
    qwenlora.compose_loras(model, file)
    assert same(first, values(model))


def test_reset_is_bit_exact(host: Any, model: Any, file: Path, probe: Any) -> None:
    before = probe.snapshot(model)
    qwenlora.compose_loras(model, [(file, STRENGTH), (file, 0.2)])
    assert before.differences(probe.snapshot(model))
    qwenlora.reset_loras(model)
    assert before.differences(probe.snapshot(model)) == []


def values(model: nn.Module) -> dict[str, Tensor]:
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.clone() for name, tensor in found.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


# ---- whole blocks and models ----


@contextmanager
def with_terms(
    host: Any, model: Any, pairs: dict[str, Pair], term: torch.dtype = torch.float64
) -> Iterator[None]:
    """Add each delta where its layer's output comes about: the oracle of a block.

    Where a kernel norms and rotates, both are done again on its plain output and the delta. The
    output of a delta is rounded to `term`.
    """
    with ExitStack() as until:
        for block in BLOCKS:
            layers = {**CALLED[host.form], MODULATION: (MODULATION,)}
            for slot, names in layers.items():
                if f"{block}.{names[0]}" not in pairs:
                    continue

                def add(
                    module: Any, args: Any, out: Tensor, block: str = block, names: Any = names
                ) -> Tensor:
                    own = terms(pairs, block, names, args[0]).to(term)
                    return (out.double() + own.double()).to(out.dtype)

                layer = model.get_submodule(f"{block}.{slot}")
                until.callback(layer.register_forward_hook(add).remove)
        if host.form in (ZImageForm.FUSED, ZImageForm.PASSED):
            until.enter_context(_with_projections(host, model, pairs, term))
        yield


@contextmanager
def _with_projections(
    host: Any, model: Any, pairs: dict[str, Pair], term: torch.dtype
) -> Iterator[None]:
    owns = projections(host, model)

    def turned(block: str, x: Tensor, packed: Tensor) -> Tensor:
        own = terms(pairs, block, QKV, x).to(term)
        plain = owns[block].plain(x).double() + own.double()
        sine, cosine = unpack_rotations(packed)[:, : x.shape[1]].unbind(-1)
        freqs = torch.complex(cosine, sine)
        return reference(plain.to(DTYPE), owns[block].norms(), freqs).to(DTYPE)

    if host.form is ZImageForm.FUSED:
        handles = [
            model.get_submodule(f"{block}.attention.fused_module").register_forward_hook(
                lambda module, args, out, block=block: turned(block, *args)
            )
            for block in owns
        ]
        yield
        for handle in handles:
            handle.remove()
        return
    blocks = {id(model.get_submodule(f"{block}.attention.to_qkv")): block for block in owns}
    original = host.module.fused_qkv_norm_rotary
    host.module.fused_qkv_norm_rotary = lambda x, layer, *norms, rotary_emb: turned(
        blocks[id(layer)], x, rotary_emb
    )
    yield
    host.module.fused_qkv_norm_rotary = original


def arguments(seed: int = 5) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """A latent of 32 by 24 tokens, a time, and a caption of 40 tokens, which is padded."""
    latent, caption = random(16, 1, 64, 48, seed=seed), random(40, 128, seed=seed + 1)
    return [latent], torch.tensor([0.3], device=DEVICE), [caption]


def block_call(host: Any, model: Any, block: str) -> Tensor:
    x, freqs = random(1, TOKENS, WIDTH, seed=1), rotations(TOKENS)
    mask = torch.ones(1, TOKENS, dtype=torch.bool, device=DEVICE)
    if host.form is ZImageForm.PASSED:
        # The model's own forward would do it.
        freqs = host.module._pack_z_image_rotary_emb(freqs)
    with host.rotations(model):
        return model.get_submodule(block)(x, mask, freqs, random(1, TIME, seed=2)).clone()


def compared(run: Callable[[], Tensor], host: Any, model: Any, path: Path, pairs: Any) -> Any:
    """Outputs of the base, the oracle and the composed model, and how far they are apart."""
    bare = [run(), run()]
    with with_terms(host, model, pairs):
        wanted = [run(), run()]
    with with_terms(host, model, pairs, DTYPE):
        rounded = run()
    qwenlora.compose_loras(model, save(path, pairs))
    found = [run(), run()]
    figures = {
        "output": relative(found[0], wanted[0]),
        "two_oracles": relative(rounded, wanted[0]),
        "effect": relative(wanted[0], bare[0]),
        "two_runs_of_base": relative(*bare),
        "two_runs_of_oracle": relative(*wanted),
        "two_runs_composed": relative(*found),
    }
    return (bare[0], wanted[0], found[0]), figures


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_a_whole_block(host: Any, model: Any, tmp_path: Path, block: str) -> None:
    pairs, path = block_deltas(4000), tmp_path / "block.safetensors"
    _, figures = compared(lambda: block_call(host, model, block), host, model, path, pairs)
    record(f"Z-Image, {host.form.value}, block {block}", **figures)
    assert figures["output"] < NOISE_BOUND * figures["two_oracles"]
    assert figures["output"] < figures["effect"] / 4


def test_a_whole_model(host: Any, model: Any, dense: Any, tmp_path: Path) -> None:
    pairs, inputs = block_deltas(5000, size=0.5), arguments()
    outputs, figures = compared(
        lambda: host.run(model, *inputs).clone(), host, model, tmp_path / "all.safetensors", pairs
    )
    exact = exact_outputs(dense, pairs, inputs)
    change = exact[1] - exact[0]
    shares = [
        float(((own.double() - outputs[0].double()) * change).sum() / change.square().sum())
        for own in outputs[1:]
    ]
    names = ("base", "oracle", "composed")
    against = (exact[0], exact[1], exact[1])
    figures |= {
        f"{name}_against_dense": relative(*both)
        for name, *both in zip(names, outputs, against, strict=True)
    }
    figures |= {"share_of_oracle": shares[0], "share_of_composed": shares[1]}
    record(f"Z-Image, {host.form.value}, whole model", **figures)
    assert figures["output"] < NOISE_BOUND * figures["two_oracles"]
    assert abs(shares[1] - shares[0]) < SHARE_BOUND


def exact_outputs(dense: Any, pairs: dict[str, Pair], inputs: Any) -> list[Tensor]:
    """The dense model's outputs in float64, as it is and with the deltas in its weights."""
    wide = nn.Module.to(copy.deepcopy(dense), DEVICE, torch.float64)
    latents, time, captions = inputs
    args = ([x.double() for x in latents], time.double(), [x.double() for x in captions])
    outputs = []
    for own in ({}, pairs):
        for path, pair in own.items():
            product = pair.scale * (pair.up.double() @ pair.down.double())
            wide.get_submodule(path).weight.data += product.to(DEVICE)
        outputs.append(wide(*args, return_dict=False)[0][0].clone())
    return outputs


@pytest.mark.parametrize("name", GATED)
def test_rows_of_value_and_gate_are_those_of_the_dense_mlp(
    host: Any, model: Any, dense: Any, tmp_path: Path, name: str
) -> None:
    """One of both is trained: the MLP's output tells which rows took it."""
    path = "layers.0.feed_forward"
    pair = delta(HIDDEN, WIDTH, 32, 11, size=2.0)
    x, mlp = random(1, TOKENS, WIDTH), model.get_submodule(path)
    base = mlp(x).double()
    qwenlora.compose_loras(model, save(tmp_path / "one.safetensors", {f"layers.0.{name}": pair}))
    arrived = mlp(x).double() - base
    product = pair.scale * (pair.up.double() @ pair.down.double())
    shares = {}
    for own in GATED:
        wide = nn.Module.to(copy.deepcopy(dense.get_submodule(path)), DEVICE, torch.float64)
        before = wide(x.double())
        wide.get_submodule(own.rpartition(".")[2]).weight.data += product.to(DEVICE)
        change = wide(x.double()) - before
        shares[own] = float((arrived * change).sum() / change.square().sum())
    (other,) = set(GATED) - {name}
    record(f"Z-Image, {host.form.value}, {name} alone", own=shares[name], as_other=shares[other])
    assert abs(shares[name] - 1) < SHARE_BOUND
    assert abs(shares[other]) < 0.5
