"""The multimodal model: which modules a rank holds, the embedding merge, the loss."""
