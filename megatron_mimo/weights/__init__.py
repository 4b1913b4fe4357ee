"""Weights in other formats: folders of tensors, and tables of names. Independent of any model."""
