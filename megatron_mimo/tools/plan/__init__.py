"""What a layout does and holds, on paper: `megatron-mimo plan`."""
