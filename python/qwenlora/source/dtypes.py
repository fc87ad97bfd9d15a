"""The dtypes that a LoRA file may hold, by the names of its header."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "NAMES"]


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Torch's dtypes by their safetensors names."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Their safetensors names by torch's dtypes."""
