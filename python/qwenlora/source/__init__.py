"""Sources of a LoRA's tensors."""
