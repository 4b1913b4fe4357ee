"""Vision encoders and the projector into the language model's width."""
