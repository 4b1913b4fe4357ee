"""Config and flags, set-up, the loop, metrics."""
