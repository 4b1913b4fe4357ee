"""Checkpoints: saving a run, keeping a checkpoint complete, and loading it on any layout."""
