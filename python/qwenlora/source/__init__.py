"""Where a LoRA's tensors come from."""
