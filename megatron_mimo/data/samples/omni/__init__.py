"""A small real dataset of three kinds of media: digits that are shown, dialled, and that move."""
