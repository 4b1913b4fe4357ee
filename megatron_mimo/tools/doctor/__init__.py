"""`megatron-mimo doctor`: whether this machine can train, before a run finds out that it cannot."""
