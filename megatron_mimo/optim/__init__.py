"""One optimizer over all modules."""
