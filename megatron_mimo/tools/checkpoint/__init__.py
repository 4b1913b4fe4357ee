"""Looking into checkpoints, and converting them."""
