"""Upper ends of ranges that fields of several parts share.

They are far above what any run uses and below what breaks a run later: a number beyond them is a
typing error, and the error should name it before anything starts.
"""

MOST_RANKS = 1_000_000
"""Ranks, and sizes of grids."""
MOST_ITERATIONS = 1_000_000_000
"""Iterations: a month of steps of 3 ms."""
MOST_SAMPLES = 1_000_000_000_000
"""Samples of a run or of a dataset."""
MOST_BATCH = 10_000_000
"""Samples of a step."""
MOST_POSITIONS = 2**24
"""Tokens of a sequence, and patches of an image."""
MOST_PIXELS = 65_536
"""Side of an image, pixels; no format has more."""
MOST_PATCH = 1024
"""Side of a patch, pixels."""
MOST_TILES = 1024
"""Tiles of an image."""
MOST_FRAMES = 1024
"""Frames of a video that are embedded together."""
MOST_CLASS_TOKENS = 1024
"""Tokens before an image's patches."""
MOST_SEED = 2**32 - 1
"""Seeds, as numpy takes them."""
MOST_LAYERS = 10_000
"""Layers of a module."""
MOST_WIDTH = 1_000_000
"""Widths of layers, and numbers of heads, groups and experts."""
