"""The multimodal model: its modules by name, those that a rank holds, and the loss."""
