"""Questions to a trained model: `megatron-mimo generate`."""
