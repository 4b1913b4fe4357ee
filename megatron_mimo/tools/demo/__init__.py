"""A small model that learns to read digits: `megatron-mimo demo`."""
