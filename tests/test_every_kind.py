"""Every kind of adapter on every kind of layer does what its float64 weights say.

A layer is called with and without the adapters, and the difference is compared with
x (t (W' - W))^T, where W is the weight that the base layer computes with. Of an MLP that runs in
one kernel the whole MLP is called, and of query, key and value that do the whole attention.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional as F

import qwenlora
from qwenlora import _reference as reference
from qwenlora import emulation
from qwenlora.emulation import EmulatedConfig, Precision, ZImageForm, random_transformer
from qwenlora.emulation.block import EmulatedFeedForward
from qwenlora.packing.layout import RowOrder
from qwenlora.packing.pack import deinterleave_modulation
from qwenlora.plan.documents import SlotKind
from qwenlora.slots.find import find_targets

from . import adapter_files, z_image_attention
from .adapter_files import KINDS, AdapterFile, modules_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from .adapter_files import Module, Stack
    from .z_image_attention import FusedAttention

EXACT = 2e-6
"""Error of what changes in a float32 output, as a share of the output: the change is a difference.

It is 1.3 % of the output at the least. Measured, with the instructions of several CPUs: 7e-7.
"""
WIDTH = 256
FEW, ENOUGH, MANY = 24, 64, 512
"""Tokens that a layer is called with: many where its rounding is to even out."""
QUICK = (
    "dora of rows",
    "dora of columns, lokr",
    "ia3 of rows by peft",
    "boft",
    "oft by onetrainer",
)


def make_base(precision: Precision = Precision.EXACT, *, blocks: int = 1, dtype=torch.float32):
    config = EmulatedConfig(
        num_layers=blocks,
        heads=4,
        head_dim=WIDTH // 4,
        axes_dims_rope=(16, 24, 24),
        joint_attention_dim=96,
        rank=32,
        precision=precision,
        dtype=dtype,
    )
    return random_transformer(config, seed=0)


def some(names, *, quick=QUICK):
    """The kinds, those that are not quick marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


# ---- what layers do ----


def tokens(count: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    return torch.randn(2, count // 2, columns, generator=generator).to(dtype)


class Layers:
    """The layers of a model as they are called, and what float64 says that they do.

    A layer is one by its path; a fused MLP is one by the path of the MLP, and query, key and value
    of a fused attention by the path of the attention.
    """

    def __init__(self, base: nn.Module, *, count: int = FEW) -> None:
        self.base = base
        self.count = count
        self.modules = modules_of(base)
        self.targets = find_targets(base, {})
        self.attentions = z_image_attention.attentions_of(self.targets)
        self._inside = {
            path: attention
            for attention, own in self.attentions.items()
            for path in (own.qkv, *own.norms)
        }
        self._expected = {path: self.expected(path, ()) for path in self._paths()}
        self._outputs = {path: self.output(base, path) for path in self._paths()}

    def _paths(self) -> dict[str, None]:
        return dict.fromkeys(self._called(path) for path in self.targets if self._is_called(path))

    def _is_called(self, path: str) -> bool:
        return self._is_matrix(path) or path in self._inside

    def _is_matrix(self, path: str) -> bool:
        return self.targets[path].kind not in (SlotKind.NORM, SlotKind.EMBEDDING)

    def _called(self, path: str) -> str:
        """The path of the module that is called: the layer, or what is fused around it."""
        if path in self._inside:
            return self._inside[path]
        head = path.partition(".net.")[0]
        is_fused = head != path and isinstance(self.base.get_submodule(head), EmulatedFeedForward)
        return head if is_fused else path

    def output(self, model: nn.Module, path: str) -> Tensor:
        """(tokens, N) float64, rows as in files."""
        if path in self.attentions:
            x = self._tokens_of(self.attentions[path])
            return z_image_attention.call(model.get_submodule(path), x)[0].double()
        target = self.targets.get(path)
        columns = WIDTH if target is None else target.row.in_features
        dtype = torch.float32 if target is None else target.dtype
        if target is None:
            dtype = self.targets[f"{path}.net.2"].dtype
        x, layer = tokens(self._count(path), columns, dtype), model.get_submodule(path)
        is_modulation = self._is_modulation(path)
        with torch.no_grad():
            if is_modulation:
                # Its kernel takes few rows, which have no other axis.
                output = torch.cat([layer(own) for own in x.flatten(0, -2).split(8)]).double()
            else:
                output = layer(x).flatten(0, -2).double()
        if target is not None and target.row_order is RowOrder.INTERLEAVED:
            output = deinterleave_modulation(output, dim=-1)
        return output

    def _is_modulation(self, path: str) -> bool:
        return path in self.targets and self.targets[path].kind is SlotKind.AWQ

    def _count(self, path: str) -> int:
        """Fewer of a modulation, which takes eight at once and rounds none of them."""
        return min(self.count, ENOUGH) if self._is_modulation(path) else self.count

    def _tokens_of(self, attention: FusedAttention) -> Tensor:
        """(1, tokens, K): the kernel takes few tokens of one sample alone."""
        target = self.targets[attention.qkv]
        return tokens(self.count, target.row.in_features, target.dtype).flatten(0, 1).unsqueeze(0)

    def weights(self, path: str, stack: Stack) -> tuple[Tensor, Tensor | None]:
        """W + sum of t (W' - W), and the bias likewise, of a layer."""
        own = [module for module in self.modules.values() if module.slot == path]
        weight = torch.cat([module.weight for module in own])
        has_bias = own[0].bias is not None
        bias = torch.cat([module.bias for module in own]) if has_bias else None
        for file, strength in stack:
            for module in own:
                merged = file.merged.get(module.name)
                if merged is None:
                    continue
                weight[module.rows] += strength * (merged.weight - module.weight)
                if merged.bias is not None:
                    bias[module.rows] += strength * (merged.bias - module.bias)
        return weight, bias

    def expected(self, path: str, stack: Stack) -> Tensor:
        """What float64 gives for the output of a layer, an MLP or an attention."""
        if path in self.attentions:
            return self._expected_attention(self.attentions[path], stack)
        if path in self.targets:
            target = self.targets[path]
            x = tokens(self._count(path), target.row.in_features, target.dtype)
            return F.linear(x.flatten(0, -2).double(), *self.weights(path, stack))
        x = tokens(self.count, WIDTH, self.targets[f"{path}.net.2"].dtype).flatten(0, -2).double()
        hidden = F.linear(x, *self.weights(f"{path}.net.0.proj", stack))
        hidden = F.gelu(hidden, approximate="tanh")
        return F.linear(hidden, *self.weights(f"{path}.net.2", stack))

    def _expected_attention(self, attention: FusedAttention, stack: Stack) -> Tensor:
        x = self._tokens_of(attention).double()
        qkv = F.linear(x, *self.weights(attention.qkv, stack))
        norms = [self.weights(path, stack)[0] for path in attention.norms]
        merged = z_image_attention.attended(qkv, norms)
        return F.linear(merged, *self.weights(attention.out, stack))[0]

    def changed(self, stack: Stack) -> dict[str, None]:
        """The paths of what is called that a stack changes."""
        slots = [self.modules[name].slot for file, _ in stack for name in file.merged]
        called = (self._called(path) for path in slots if self._is_called(path))
        return dict.fromkeys(called)

    def errors(self, model: nn.Module, stack: Stack) -> dict[str, float]:
        """The error of what a stack changes in each output, as a share of the output."""
        errors = {}
        for path in self.changed(stack):
            before, after = self._outputs[path], self.output(model, path)
            expected = self.expected(path, stack) - self._expected[path]
            size = max(before.norm(), after.norm())
            errors[path] = float((after - before - expected).norm() / size)
        return errors

    def assert_holds(self, model: nn.Module, stack: Stack) -> None:
        """Each layer does what the stack says, and the others what they did."""
        wrong = {path: own for path, own in self.errors(model, stack).items() if not own < EXACT}
        assert wrong == {}
        for path in self._paths().keys() - self.changed(stack).keys():
            assert torch.equal(self.output(model, path), self._outputs[path]), path
        self.assert_values(model, stack)

    def assert_values(self, model: nn.Module, stack: Stack) -> None:
        """Stored values that are no matrix of a product are what the stack makes them."""
        for path, target in self.targets.items():
            if self._is_matrix(path):
                continue
            weight, _ = self.weights(path, stack)
            holder = model.get_submodule(path.removesuffix(f".{target.prefix.rstrip('_')}"))
            found = getattr(holder, f"{target.prefix}weight").double()
            torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-6)
            assert target.dtype is torch.float32


@pytest.fixture(scope="module")
def base():
    return make_base()


@pytest.fixture(scope="module")
def layers(base):
    return Layers(base)


@pytest.fixture(scope="module")
def files(layers, tmp_path_factory):
    """Makes a file of a kind on every module that it fits; each is written once."""
    return Files(layers.modules, tmp_path_factory.mktemp("files"))


class Files:
    """Files of each kind for one model."""

    def __init__(self, modules: Mapping[str, Module], folder) -> None:
        self._modules = modules
        self._folder = folder
        self._known = {}

    def __call__(self, name: str, seed: int = 0):
        """(path, file)."""
        if (name, seed) not in self._known:
            file = AdapterFile.of(name, self._modules.values(), seed)
            path = file.save(self._folder / f"{name.replace(' ', '-')}-{seed}")
            self._known[name, seed] = (path, file)
        return self._known[name, seed]


def composed(model, *stack):
    """Compose files with their strengths; the stack of files."""
    report = qwenlora.compose_loras(model, [(path, strength) for (path, _), strength in stack])
    left_out = [skip for lora in report.loras for skip in lora.skipped if skip.matters]
    assert left_out == []
    assert report.complete
    assert report.energy_lost == 0
    return [(file, strength) for (_, file), strength in stack]


# ---- what is compared with ----


def test_the_base_s_weights_are_what_its_layers_compute_with(layers):
    for path in layers._paths():
        expected = layers._expected[path]
        error = float((layers._outputs[path] - expected).norm() / expected.norm())
        assert error < EXACT, path


def test_the_formulas_are_those_of_the_reference():
    draw = adapter_files.Draw(0)
    weight = draw.normal(16, 32).double()
    delta, scale = draw.normal(16, 32, size=0.1).double(), draw.factors(16, 1)
    skew = draw.normal(4, 8, 8, size=0.1).double()
    skew = skew - skew.mT
    triangles = draw.normal(3, 28)
    a, b = [(draw.normal(32, 2), draw.normal(2, 32)), (draw.normal(16, 2), draw.normal(2, 32))]
    own, other = adapter_files, reference
    turns = own.cayley(skew)
    rows = (weight + delta).norm(dim=1, keepdim=True)
    columns = (weight + delta).norm(dim=0, keepdim=True)
    magnitudes = [
        (draw.factors(16, 1), rows),
        (draw.factors(16), rows),
        (draw.factors(1, 32), columns),
    ]
    skews = [other.skew_of_triangle(row, 8) for row in triangles]
    stages = own.cayley(0.5 * torch.stack([skew[:2], skew[2:]]))
    pairs = [
        *(
            (own.dora(weight, delta, m, lengths), other.dora_weight(weight, delta, m))
            for m, lengths in magnitudes
        ),
        (own.glora(weight, a, b, 0.3), other.glora_weight(weight, a, b, 0.3)),
        (own.hra(weight, a[0]), other.hra_weight(weight, a[0])),
        (turns, torch.stack([other.cayley(block) for block in skew])),
        (own.cayley_series(skew), torch.stack([other.cayley_series(block) for block in skew])),
        (own.skew_of_triangles(triangles, 8), torch.stack(skews)),
        (own.diag_oft(weight, turns[:2]), other.diag_oft_weight(weight, turns[:2])),
        (own.boft(weight, stages, scale), other.boft_weight(weight, stages, scale)),
        (own.input_oft(weight, turns), other.input_oft_weight(weight, turns)),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---- every kind ----


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_alone_and_at_another_strength(name, base, layers, files, probe):
    """A deep copy goes on alone, too."""
    model = copy.deepcopy(base)
    stack = composed(model, (files(name), -0.7))
    layers.assert_holds(model, stack)
    twin = copy.deepcopy(model)
    layers.assert_holds(model, composed(model, (files(name), 0.35)))
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(probe.snapshot(base)) == []
    layers.assert_holds(twin, stack)
    layers.assert_holds(twin, composed(twin, (files(name), 0.35)))


@pytest.mark.parametrize("name", some(KINDS))
def test_stacked_with_a_lora_and_with_another_of_its_kind(name, base, layers, files, probe):
    model = copy.deepcopy(base)
    stack = [(files(name), -0.7), (files("lora", 3), 0.5), (files(name, 1), 0.35)]
    layers.assert_holds(model, composed(model, *stack))
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(probe.snapshot(base)) == []


# ---- 4 bits ----

MORE_ERROR, CENTRED = 1.1, 1.13
"""How much further from float64 a layer's output may be with an adapter than without.

An int4 MLP is further off where what GELU gives is changed: it is then quantized with a sign, which
leaves 14 steps instead of 15. Measured: 1.107."""
ROUNDED = 3.3e-3
"""The same where bfloat16 is all that rounds: the output, and what is added to it, as of any LoRA.

Measured: 1.7e-3 without an adapter, 2.4e-3 with a LoRA, at most 3.1e-3 with any."""
ARRIVES = (0.97, 1.03)
"""The share of the wanted change of an output that arrives.

Of both, what is the same for all tokens is left out: so much does the rounding of values that stand
together, as GELU's small ones do, move every output, and each rounding another way."""


OF_INPUT = [name for name in KINDS if "columns" in name or "oft by" in name]


@pytest.fixture(scope="module")
def rounded():
    """A model of 4 bits, as the kernels round."""
    return Layers(make_base(Precision.W4A4, dtype=torch.bfloat16), count=MANY)


@pytest.mark.slow
@pytest.mark.parametrize("name", some(KINDS))
def test_in_four_bits(name, rounded, probe, tmp_path):
    base, model = rounded.base, copy.deepcopy(rounded.base)
    stack = composed(model, (Files(rounded.modules, tmp_path)(name), 1.0))
    wrong = {}
    for path in rounded.changed(stack):
        before, after = rounded._outputs[path], rounded.output(model, path)
        expected = [rounded._expected[path], rounded.expected(path, stack)]
        errors = [
            float((found - own).norm() / own.norm())
            for found, own in zip((before, after), expected, strict=True)
        ]
        wanted = expected[1] - expected[0]
        wanted, found = (own - own.mean(dim=0) for own in (wanted, after - before))
        share = float((found * wanted).sum() / wanted.square().sum())
        more = CENTRED if path.endswith("_mlp") and name in OF_INPUT else MORE_ERROR
        if errors[1] > max(more * errors[0], ROUNDED) or not ARRIVES[0] < share < ARRIVES[1]:
            wrong[path] = (*errors, share)
    assert wrong == {}
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(probe.snapshot(base)) == []


# ---- block offload ----

BLOCKS = 3
TRAINED = 1
"""The block that a file of one block trains; the others hold zeros in its place."""
OFFLOADED = ((1, True), (2, False))
"""How many blocks stay on the device, and if the others' memory is pinned."""


@pytest.fixture(scope="module")
def deep():
    """A model of several blocks, and what it holds."""
    model = make_base(blocks=BLOCKS)
    return model, modules_of(model)


def in_block(modules, block: int):
    head = f"transformer_blocks.{block}."
    return [own for name, own in modules.items() if name.startswith(head)]


@pytest.mark.parametrize("name", some([*KINDS, "all in turn"], quick=("all in turn",)))
def test_offloaded_as_resident(name, deep, probe, tmp_path):
    base, modules = deep
    if name == "all in turn":
        files = adapter_files.mixed(modules.values())
    else:
        files = [AdapterFile.of(name, in_block(modules, TRAINED))]
    files.append(AdapterFile.of("lora", in_block(modules, BLOCKS - 1)))
    paths = [file.save(tmp_path / str(number)) for number, file in enumerate(files)]
    twin, *models = (copy.deepcopy(base) for _ in range(1 + len(OFFLOADED)))
    for model, (resident, pinned) in zip(models, OFFLOADED, strict=True):
        model.set_offload(True, use_pin_memory=pinned, num_blocks_on_gpu=resident)
    for strength in (-0.7, 0.35):
        outputs = []
        for own in (twin, *models):
            report = qwenlora.compose_loras(own, [(path, strength) for path in paths])
            assert report.complete
            outputs.append(probe.output(own))
        for output, how in zip(outputs[1:], OFFLOADED, strict=True):
            assert (output - outputs[0]).norm() <= 1e-6 * outputs[0].norm(), how
    answer, untouched = probe.output(base), probe.snapshot(base)
    for model, how in zip(models, OFFLOADED, strict=True):
        qwenlora.reset_loras(model)
        assert torch.equal(probe.output(model), answer), how
        model.set_offload(False)
        assert probe.snapshot(model).differences(untouched) == [], how


# ---- compiled ----


@pytest.mark.slow
def test_compiled_as_eager(base, layers, probe, tmp_path):
    torch._dynamo.reset()
    files = adapter_files.mixed(layers.modules.values())
    stack = [(file.save(tmp_path / str(number)), 0.8) for number, file in enumerate(files)]
    eager, model = copy.deepcopy(base), copy.deepcopy(base)
    compiled = torch.compile(model, backend="eager")
    for loras in ([], stack, [], stack[:5], stack):
        for own in (eager, model):
            qwenlora.compose_loras(own, loras)
        expected = probe.output(eager)
        assert (
            probe.output(model, call=compiled.__call__) - expected
        ).norm() <= 1e-6 * expected.norm()
    torch._dynamo.reset()


# ---- other blocks ----


@pytest.fixture(scope="module")
def lite(diffusers):
    """diffusers' own blocks."""
    pytest.importorskip("diffusers.quantizers.nunchaku")
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    dense = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=96,
        axes_dims_rope=(16, 24, 24),
    )
    dense = dense.eval().requires_grad_(False)
    return Layers(
        emulation.lite_transformer(dense, rank=32, precision=Precision.EXACT, dtype=torch.float32)
    )


EACH_WAY = (
    "dora of columns",
    "dora of rows, lokr",
    "ia3 of rows",
    "glora",
    "boft",
    "oft by peft",
    "boft by peft",
    "set_weight",
)
"""One kind for each way to run."""
ON_Z_IMAGE = [
    pytest.param(form, name, marks=pytest.mark.slow, id=f"{form.value}-{name}")
    for form in ZImageForm
    for name in (KINDS if form is ZImageForm.FUSED else EACH_WAY)
]


@pytest.fixture(scope="module")
def z_images(diffusers):
    """Makes Z-Image of every software, each once."""
    pytest.importorskip("diffusers.models.transformers.transformer_z_image")

    # pytest would make a fixture of a form anew for each row.
    @functools.cache
    def z_image(form: ZImageForm) -> Layers:
        model = emulation.z_image_transformer(
            emulation.tiny_z_image(layers=1),
            form=form,
            rank=16,
            precision=Precision.EXACT,
            dtype=torch.float32,
        )
        return Layers(model)

    return z_image


@pytest.mark.slow
@pytest.mark.parametrize("name", some(KINDS))
def test_on_diffusers_blocks(name, lite, probe, tmp_path):
    holds_in(lite, name, probe, tmp_path)


@pytest.mark.parametrize(("form", "name"), ON_Z_IMAGE)
def test_on_z_image(form, name, z_images, probe, tmp_path):
    holds_in(z_images(form), name, probe, tmp_path)


def holds_in(layers: Layers, name: str, probe, folder) -> None:
    files = Files(layers.modules, folder)
    model = copy.deepcopy(layers.base)
    layers.assert_holds(model, composed(model, (files(name), -0.7)))
    stack = [(files(name), 0.5), (files("lora", 3), 0.5), (files(name, 1), 0.35)]
    layers.assert_holds(model, composed(model, *stack))
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(probe.snapshot(layers.base)) == []
