"""Adapters of low rank (LoRA) in modules of any family: flags, placement, and peft's format."""
