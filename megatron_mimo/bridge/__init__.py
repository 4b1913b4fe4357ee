"""Carry rows from the encoder to the language model, and their gradients back."""
