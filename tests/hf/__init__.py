"""Tiny models of transformers' families, and training from them against transformers itself."""
