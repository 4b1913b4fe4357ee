"""One sample, from its stored form to the form for collation."""
