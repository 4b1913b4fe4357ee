"""Answers of a trained model, scored: `megatron-mimo evaluate`."""
