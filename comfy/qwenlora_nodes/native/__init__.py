"""ComfyUI's own LoRA nodes and hooks on a Nunchaku model, through our engine.

`enable` gives a clone whose patcher takes the patches that those nodes hand over, whoever wrote the
node, and turns them into LoRAs of the stack that the clone asks for. Nothing that clones share is
changed, and nothing of ComfyUI's is replaced.
"""

from __future__ import annotations

from .patcher import enable, is_enabled, wanted_set

__all__ = ["enable", "is_enabled", "wanted_set"]
