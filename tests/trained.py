"""Adapters trained by the tools that people train with, and what those tools then compute.

A Qwen-Image transformer of one block learns to draw bars. Adapters of it learn to draw discs,
by flow matching, for `STEPS` steps each. That is seconds for each kind, so `trained` keeps what it
made for as long as the process lives.
"""

from __future__ import annotations

import atexit
import copy
import functools
import logging
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import pytest
import torch
from diffusers import QwenImageTransformer2DModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

CONFIG = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}
BLOCK = "transformer_blocks.0"
TARGETS = (
    # One and two of three members of a fused layer, and each other kind of slot.
    *(f"{BLOCK}.attn.{name}" for name in ("to_q", "to_v", "add_k_proj", "to_out.0")),
    *(f"{BLOCK}.{name}" for name in ("img_mlp.net.0.proj", "img_mlp.net.2", "img_mod.1")),
    "proj_out",
)
FEW = (f"{BLOCK}.attn.to_q", f"{BLOCK}.img_mlp.net.0.proj", f"{BLOCK}.img_mod.1")
"""What is trained of the kinds whose tools take many small steps for each layer."""
STEPS = 60
BASE_STEPS = 100
BATCH = 4
SIDE = 8
"""Of an image in pixels; a token is four of them."""


@dataclass(frozen=True)
class Trained:
    """An adapter as its tool saved it.

    Attributes:
        source: A file, or a folder that PEFT made.
        weights: Of each layer that it changes, by path, (out, in) float64: the weight that the
            tool's own layer computes with, taken from its outputs in float32.
        biases: (out,) likewise.
        flow: What `flow_of` gives of the tool's own model.
        losses: On the same images before and after training.
    """

    source: Path
    weights: Mapping[str, torch.Tensor]
    biases: Mapping[str, torch.Tensor]
    flow: torch.Tensor
    losses: tuple[float, float]


# ---- images ----


def _bars(generator: torch.Generator) -> torch.Tensor:
    """(BATCH, SIDE, SIDE): one row or column is lit."""
    images = torch.zeros(BATCH, SIDE, SIDE)
    for image in images:
        place, upright = torch.randint(SIDE, (2,), generator=generator).tolist()
        (image.T if upright % 2 else image)[place] = 1
    return images


def _discs(generator: torch.Generator) -> torch.Tensor:
    """(BATCH, SIDE, SIDE): a disc somewhere."""
    grid = torch.arange(SIDE)
    centre = torch.randint(2, SIDE - 2, (BATCH, 2), generator=generator)
    rows = (grid - centre[:, :1]).square().unsqueeze(2)
    columns = (grid - centre[:, 1:]).square().unsqueeze(1)
    return (rows + columns <= 5).float()


def _latents(images: torch.Tensor) -> torch.Tensor:
    """(BATCH, tokens, 16): four channels of two by two pixels."""
    channels = torch.stack([images, -images, images.flip(1), 0.5 * images], dim=1) * 2 - 0.5
    patches = channels.unfold(2, 2, 2).unfold(3, 2, 2)
    # (B, channels, rows, columns, 2, 2) -> (B, rows, columns, channels, 2, 2)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def _flow(
    model: torch.nn.Module, images: torch.Tensor, mixed: torch.Tensor, time: torch.Tensor
) -> torch.Tensor:
    """(BATCH, tokens, 16): what a model makes of noisy images, told what they are of."""
    words = images.flatten(1).unsqueeze(1).expand(BATCH, 3, SIDE * SIDE)
    (flow,) = model(
        hidden_states=mixed,
        encoder_hidden_states=words * torch.tensor([1.0, -0.5, 0.2]).view(1, 3, 1),
        encoder_hidden_states_mask=None,
        timestep=time,
        img_shapes=[[(1, SIDE // 2, SIDE // 2)]] * BATCH,
        return_dict=False,
    )
    return flow


def _loss(model: torch.nn.Module, images: torch.Tensor, generator: torch.Generator):
    """The mean squared error of the flow from noise to images."""
    clean = _latents(images)
    noise = torch.randn(clean.shape, generator=generator)
    time = torch.rand(BATCH, generator=generator)
    mixed = clean + time.view(-1, 1, 1) * (noise - clean)
    return (_flow(model, images, mixed, time) - (noise - clean)).square().mean()


def flow_of(model: torch.nn.Module) -> torch.Tensor:
    """(BATCH, tokens, 16) float64: what a model makes of the same noisy discs."""
    generator = torch.Generator().manual_seed(4)
    images = _discs(generator)
    mixed = _latents(images) + torch.randn(BATCH, (SIDE // 2) ** 2, 16, generator=generator)
    with torch.no_grad():
        return _flow(model, images, mixed, torch.rand(BATCH, generator=generator)).double()


def _train(
    model: torch.nn.Module,
    parameters: Iterable[torch.nn.Parameter],
    images: Callable[[torch.Generator], torch.Tensor],
    *,
    steps: int,
    rate: float,
) -> tuple[float, float]:
    """Train, and measure the loss before and after."""
    own = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=rate)
    generator = torch.Generator().manual_seed(1)

    def measured() -> float:
        same = torch.Generator().manual_seed(2)
        with torch.no_grad():
            return float(sum(_loss(model, images(same), same) for _ in range(8)))

    before = measured()
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(model, images(generator), generator).backward()
        optimizer.step()
    return before, measured()


@functools.cache
def base_model() -> QwenImageTransformer2DModel:
    """The dense model that all adapters are trained on; not to be changed."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        model = QwenImageTransformer2DModel(**CONFIG)
        _train(model, model.parameters(), _bars, steps=BASE_STEPS, rate=1e-3)
    return model.eval().requires_grad_(False)


def responses(model: torch.nn.Module, paths: Iterable[str]):
    """Weights and biases float64 of layers, by path, from what they make of unit vectors."""
    weights, biases = {}, {}
    with torch.no_grad():
        for path in paths:
            layer = model.get_submodule(path)
            columns = base_model().get_submodule(path).in_features
            inputs = torch.cat([torch.zeros(1, columns), torch.eye(columns)])
            outputs = layer(inputs).double()
            weights[path], biases[path] = (outputs[1:] - outputs[0]).T, outputs[0]
    return weights, biases


# ---- LyCORIS ----

WHOLE = {"algo": "lokr", "linear_dim": 10_000_000_000, "linear_alpha": 10_000_000_000}
"""ai-toolkit's `lokr_full_rank`: a rank that no factor is below."""
LYCORIS = {
    "LyCORIS LoKr, factor -1": {**WHOLE, "factor": -1},
    "LyCORIS LoKr, factor 8": {**WHOLE, "factor": 8},
    "LyCORIS LoKr, factor 16": {**WHOLE, "factor": 16},
    "LyCORIS DoRA of rows": {"algo": "lora", "dora_wd": True, "linear_alpha": 2},
    "LyCORIS DoRA of columns": {
        "algo": "lora",
        "dora_wd": True,
        "wd_on_output": False,
        "linear_alpha": 2,
    },
    "LyCORIS DoRA of rows, LoKr": {**WHOLE, "factor": 8, "dora_wd": True},
    "LyCORIS GLoRA": {"algo": "glora", "linear_alpha": 2},
    "LyCORIS IA3": {"algo": "ia3"},
    "LyCORIS diag-OFT": {"algo": "diag-oft", "linear_dim": 8, "rescaled": True},
    "LyCORIS BOFT": {"algo": "boft", "linear_dim": 8},
}
"""Options of `create_lycoris`."""


def _by_lycoris(name: str, folder: Path) -> Trained:
    lycoris = pytest.importorskip("lycoris")
    preset = folder / "preset.toml"
    names = ", ".join(f'"{path}"' for path in targets(name))
    preset.write_text(f"target_module = []\ntarget_name = [{names}]\n")
    model = copy.deepcopy(base_model())
    logging.disable(logging.WARNING)
    try:
        network = lycoris.create_lycoris(model, 1.0, preset=str(preset), **LYCORIS[name])
    finally:
        logging.disable(logging.NOTSET)
    assert len(network.loras) == len(targets(name))
    network.apply_to()
    parameters = network.prepare_optimizer_params(None)[0]["params"]
    losses = _train(model, parameters, _discs, steps=STEPS, rate=_rate(name))
    with torch.no_grad():
        # What is saved is what is measured.
        for parameter in parameters:
            parameter.copy_(parameter.bfloat16())
    source = folder / "lycoris.safetensors"
    network.save_weights(str(source), torch.bfloat16, {})
    return Trained(source, *responses(model, targets(name)), flow_of(model), losses)


# ---- PEFT ----

PEFT = {
    "PEFT DoRA": (peft.LoraConfig, {"r": 4, "lora_alpha": 2, "use_dora": True}),
    "PEFT OFT": (peft.OFTConfig, {"oft_block_size": 8}),
    "PEFT OFT, solved": (peft.OFTConfig, {"oft_block_size": 8, "use_cayley_neumann": False}),
    "PEFT BOFT": (peft.BOFTConfig, {"boft_block_size": 8, "boft_n_butterfly_factor": 1}),
    "PEFT HRA": (peft.HRAConfig, {"r": 4}),
    "PEFT IA3": (peft.IA3Config, {"feedforward_modules": [f"{BLOCK}.img_mlp.net.2"]}),
}
"""Kinds of configuration, and their options."""


def _by_peft(name: str, folder: Path) -> Trained:
    kind, options = PEFT[name]
    config = kind(target_modules=list(targets(name)), **options)
    with warnings.catch_warnings():
        # BOFT looks for a compiler, and goes on without one.
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base_model()), config)
    losses = _train(model, model.parameters(), _discs, steps=STEPS, rate=_rate(name))
    model.eval()
    model.save_pretrained(folder)
    weights, biases = responses(model.base_model.model, targets(name))
    return Trained(folder, weights, biases, flow_of(model), losses)


NAMES = (*LYCORIS, *PEFT)


def targets(name: str) -> tuple[str, ...]:
    """The layers that an adapter of this name changes."""
    return FEW if name.endswith(("BOFT", "HRA")) else TARGETS


def _rate(name: str) -> float:
    """A rate at which deltas reach a tenth of the weight and more, within so few steps."""
    return 1e-2 if name.endswith(("IA3", "HRA")) else 2e-3


@functools.cache
def trained(name: str) -> Trained:
    """An adapter of `base_model` by its name in `NAMES`."""
    folder = Path(tempfile.mkdtemp(prefix="trained-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make = _by_lycoris if name in LYCORIS else _by_peft
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(3)
        return make(name, folder)
