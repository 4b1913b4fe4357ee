"""Are two runs the same: `megatron-mimo parity`."""
