"""Train multimodal models whose modules live on separate process grids."""

__version__ = "0.1.0"
