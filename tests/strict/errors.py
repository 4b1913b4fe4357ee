"""Errors of the strict group."""


class StrictError(RuntimeError):
    """A program does what NCCL does not do: it would hang there, or move wrong data."""
