"""What a layout computes and holds, without running it: `megatron-mimo plan`."""
