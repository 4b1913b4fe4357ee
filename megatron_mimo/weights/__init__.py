"""Weights of other formats: folders of tensors, and tables of names. Knows no model."""
