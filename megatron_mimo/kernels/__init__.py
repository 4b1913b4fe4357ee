"""Layers and kernels that megatron-core's models are built from, on a GPU and on a host."""
