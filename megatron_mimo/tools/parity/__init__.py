"""Comparison of two runs: `megatron-mimo parity`."""
