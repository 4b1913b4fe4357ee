"""A training run: its set-up on each rank, the steps, and the loop around them."""
