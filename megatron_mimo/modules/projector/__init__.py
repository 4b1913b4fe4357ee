"""Projector from the rows of an encoder to the language model's width."""
