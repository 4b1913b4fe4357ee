"""Parakeet, a FastConformer encoder of audio clips of any length."""
