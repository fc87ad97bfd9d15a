"""CPU stand-ins for Nunchaku's layers and for Qwen-Image and Z-Image transformers made of them.

They hold the same parameters under the same names, in the same order and the same packed layouts,
run them in the same places, and enforce what the CUDA kernels only assume. So code that writes
LoRAs into a Nunchaku model can be written and tested without a GPU and without Nunchaku:

    import torch
    from qwenlora import emulation

    config = emulation.EmulatedConfig(
        num_layers=2,
        heads=2,
        head_dim=64,
        axes_dims_rope=(16, 24, 24),
        joint_attention_dim=96,
        precision=emulation.Precision.EXACT,
        dtype=torch.float32,
    )
    model = emulation.random_transformer(config, seed=0)

`lite_transformer` makes the other form of the model: diffusers' own classes, as its quantizer for
Nunchaku's checkpoints builds them, with kernels in PyTorch.

`z_image_transformer` makes Z-Image, in each form in which it is loaded (`ZImageForm`), from a dense
diffusers model. `tiny_z_image` makes a small dense one:

    model = emulation.z_image_transformer(
        emulation.tiny_z_image(),
        form=emulation.ZImageForm.FUSED,
        rank=32,
        precision=emulation.Precision.EXACT,
        dtype=torch.float32,
    )
"""

from qwenlora.requirements import require

require()

from qwenlora.emulation.attention import EmulatedAttention
from qwenlora.emulation.awq import AWQW4A16Linear
from qwenlora.emulation.block import EmulatedFeedForward, EmulatedTransformerBlock
from qwenlora.emulation.config import EmulatedConfig
from qwenlora.emulation.contract import KernelContractError
from qwenlora.emulation.linear import SVDQW4A4Linear
from qwenlora.emulation.lite_model import lite_transformer
from qwenlora.emulation.mlp import fused_gelu_mlp
from qwenlora.emulation.offload import CPUOffloadManager
from qwenlora.emulation.precision import Precision
from qwenlora.emulation.synthetic import random_transformer
from qwenlora.emulation.transformer import EmulatedOutput, EmulatedQwenImageTransformer
from qwenlora.emulation.z_image_dense import tiny_z_image
from qwenlora.emulation.z_image_form import ZImageForm
from qwenlora.emulation.z_image_model import z_image_transformer
from qwenlora.packing.layout import RowOrder

__all__ = [
    "AWQW4A16Linear",
    "CPUOffloadManager",
    "EmulatedAttention",
    "EmulatedConfig",
    "EmulatedFeedForward",
    "EmulatedOutput",
    "EmulatedQwenImageTransformer",
    "EmulatedTransformerBlock",
    "KernelContractError",
    "Precision",
    "RowOrder",
    "SVDQW4A4Linear",
    "ZImageForm",
    "fused_gelu_mlp",
    "lite_transformer",
    "random_transformer",
    "tiny_z_image",
    "z_image_transformer",
]
