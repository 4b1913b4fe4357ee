"""A dense decoder over megatron-core."""
