"""One HTML page on a run: `megatron-mimo report`."""
