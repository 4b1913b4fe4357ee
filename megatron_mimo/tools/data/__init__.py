"""Commands for datasets: writing them, and showing them as the model reads them."""
