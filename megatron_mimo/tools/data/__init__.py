"""Datasets: writing them, and looking at them as the model will see them."""
