"""Language models: configs and builders over megatron-core."""
