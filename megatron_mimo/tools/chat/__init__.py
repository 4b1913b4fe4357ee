"""A conversation with a trained model on a terminal: `megatron-mimo chat`."""
