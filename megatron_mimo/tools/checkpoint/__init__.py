"""Inspection and conversion of checkpoints."""
