"""The patch grids that an image is resized to, from its size alone.

A *grid* is (patch rows, patch columns) of a resized image, or of one of its tiles.
"""

import math

from megatron_mimo.images.config import ImageConfig

Grid = tuple[int, int]


def image_grids(width: int, height: int, config: ImageConfig) -> tuple[Grid, ...]:
    """Grids of an image's pieces: of its tiles and thumbnail, else of the one whole.

    Args:
        width: Pixels, at least 1.
        height: Pixels, at least 1.
        config: Mode, bounds and patch size.
    """
    if config.dynamic_resolution:
        native = native_grid if config.grid_rule == "nearest" else nemotron_omni_grid
        return (native(width, height, config),)
    fixed = (config.img_h // config.patch_dim, config.img_w // config.patch_dim)
    if not config.use_tiling:
        return (fixed,)
    rows, columns = tile_layout(width, height, config)
    tiles = rows * columns
    return (fixed,) * (tiles + (config.use_thumbnail and tiles > 1))


def rows_for(width: int, height: int, config: ImageConfig) -> int:
    """Rows that an image of `width` x `height` pixels becomes."""
    return rows_of(image_grids(width, height, config), config)


def rows_of(grids: tuple[Grid, ...], config: ImageConfig) -> int:
    """Rows that the patches of an image's pieces become."""
    return sum(rows * columns for rows, columns in grids) // config.patches_per_row


def native_grid(width: int, height: int, config: ImageConfig) -> Grid:
    """The grid nearest to an image's own size and shape.

    Each side is its native length rounded to whole units (a patch, or two with pixel shuffle), then
    scaled by one factor into the bounds on the number of patches: up and rounded up to reach the
    minimum, down and rounded down to keep the maximum. Where both cannot hold, the maximum does.
    """
    side = config.grid_unit
    native_h, native_w = height / config.unit, width / config.unit
    grid_h, grid_w = max(1, round(native_h)), max(1, round(native_w))
    least = math.ceil(config.min_patches / side**2)
    if grid_h * grid_w < least:
        factor = math.sqrt(least / (native_h * native_w))
        grid_h, grid_w = math.ceil(native_h * factor), math.ceil(native_w * factor)
    if config.max_patches:
        grid_h, grid_w = _shrink(grid_h, grid_w, config.max_patches // side**2)
    return grid_h * side, grid_w * side


def nemotron_omni_grid(width: int, height: int, config: ImageConfig) -> Grid:
    """The grid that transformers' processor of Nemotron H Omni models chooses, step by step.

    Sides are counted in patches, begun ones whole, and then one more for an odd number of whole
    ones; scaled down into the maximum, then up to the minimum; and completed to pairs of patches
    where that keeps the maximum, cut to pairs otherwise. Rows come first. The order of these steps
    decides the grid: between them the maximum may be left again.
    """
    # Halves are rounded to even, which is where the odd ones grow.
    grid_h, grid_w = (round(side / config.patch_dim + 0.5) for side in (height, width))
    most = config.max_patches or math.inf
    factor = min(math.sqrt(most / (grid_h * grid_w)), 1.0)
    grid_h, grid_w = math.floor(factor * grid_h), math.floor(factor * grid_w)
    if not grid_h * grid_w:
        # So long that these steps would leave nothing of the shorter side.
        return native_grid(width, height, config)
    if grid_h * grid_w < config.min_patches < most:
        factor = math.sqrt(config.min_patches / (grid_h * grid_w))
        grid_h, grid_w = math.ceil(factor * grid_h), math.ceil(factor * grid_w)
    grid_h = _to_units(grid_h, grid_w, config.grid_unit, most)
    return grid_h, _to_units(grid_w, grid_h, config.grid_unit, most)


def _to_units(side: int, other: int, unit: int, most: float) -> int:
    """A side made a multiple of the unit: the next one if the grid keeps its maximum."""
    above = -(-side // unit) * unit
    return above if above == side or above * other <= most else max(unit, side // unit * unit)


def _shrink(grid_h: int, grid_w: int, most: int) -> Grid:
    """Scale both sides by one factor until at most `most` cells are left, one at least per side."""
    if grid_h * grid_w <= most:
        return grid_h, grid_w
    factor = math.sqrt(most / (grid_h * grid_w))
    small_h, small_w = max(1, int(grid_h * factor)), max(1, int(grid_w * factor))
    # A side held at one leaves less to the other than the common factor gives it.
    return min(small_h, max(1, most // small_w)), min(small_w, max(1, most // small_h))


def tile_layout(width: int, height: int, config: ImageConfig) -> Grid:
    """Rows and columns of tiles whose joint shape is nearest to the image's.

    Of several equally near, the largest that the image fills at least by half (InternVL 1.5, Chen
    et al. 2024, section 3.3).
    """
    shape = width / height
    best, nearest = (1, 1), math.inf
    layouts = (
        (rows, tiles // rows)
        for tiles in range(1, config.max_num_tiles + 1)
        for rows in range(1, tiles + 1)
        if tiles % rows == 0
    )
    for rows, columns in layouts:
        pixels = rows * columns * config.img_h * config.img_w
        distance = abs(shape - columns * config.img_w / (rows * config.img_h))
        if distance < nearest or (distance == nearest and 2 * width * height > pixels):
            best, nearest = (rows, columns), distance
    return best
