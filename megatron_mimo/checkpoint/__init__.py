"""Checkpoints: what a run saves, how it stays whole, and how another layout loads it."""
