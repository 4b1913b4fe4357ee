"""Families of modules: sources, such as encoders, and language models."""
