"""diffusers' LoRA methods, for pipelines whose transformer is quantized."""
