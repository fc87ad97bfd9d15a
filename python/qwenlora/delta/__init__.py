"""A slot's delta as tensors, one slot at a time."""
