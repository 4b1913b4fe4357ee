import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_mimo.media.images import (
    EncodedImage,
    ImageConfig,
    encode_image,
    image_grids,
    pack_images,
    rows_for,
)
from megatron_mimo.media.images.encode import patchify
from megatron_mimo.media.images.grid import native_grid, nemotron_omni_grid
from megatron_mimo.media.images.packing import pack_patches

sides = st.integers(1, 3000)
configs = st.builds(
    lambda patch, shuffle, least, extra: ImageConfig(
        patch_dim=patch,
        pixel_shuffle=shuffle,
        min_patches=least,
        max_patches=0 if extra is None else max(least, 4) + extra,
    ),
    st.sampled_from([8, 14, 16]),
    st.booleans(),
    st.integers(1, 64),
    st.none() | st.integers(0, 4000),
)
grids = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=5)


@given(sides, sides, configs)
def test_grid_respects_the_maximum_and_whole_rows(
    width: int, height: int, config: ImageConfig
) -> None:
    grid = native_grid(width, height, config)
    side = 2 if config.pixel_shuffle else 1
    assert min(grid) >= side
    assert grid[0] % side == grid[1] % side == 0
    if config.max_patches:
        assert grid[0] * grid[1] <= config.max_patches
    assert rows_for(width, height, config) * config.patches_per_row == grid[0] * grid[1]


@given(sides, sides, st.integers(1, 64), st.booleans())
def test_grid_reaches_the_minimum(width: int, height: int, least: int, shuffle: bool) -> None:
    config = ImageConfig(pixel_shuffle=shuffle, min_patches=least, max_patches=0)
    grid_h, grid_w = native_grid(width, height, config)
    assert grid_h * grid_w >= least


@given(st.integers(1, 40), st.integers(1, 40))
def test_image_of_whole_units_keeps_its_size(units_h: int, units_w: int) -> None:
    config = ImageConfig(patch_dim=8, pixel_shuffle=True, min_patches=1, max_patches=0)
    assert native_grid(units_w * 16, units_h * 16, config) == (2 * units_h, 2 * units_w)


@given(st.integers(100, 3000), st.integers(100, 3000))
def test_shrinking_keeps_the_aspect_ratio(width: int, height: int) -> None:
    config = ImageConfig(patch_dim=8, pixel_shuffle=False, max_patches=256)
    grid_h, grid_w = native_grid(width, height, config)
    # The true grid lies within a patch of each side, before and after scaling.
    assert (grid_h - 1) / (grid_w + 2) <= height / width <= (grid_h + 2) / max(1e-9, grid_w - 1)


def test_long_image_uses_the_patches_it_may_have() -> None:
    config = ImageConfig(patch_dim=8, pixel_shuffle=False, min_patches=1, max_patches=100)
    assert native_grid(8 * 5000, 8, config) == (1, 100)
    assert native_grid(8, 8 * 5000, config) == (100, 1)


@pytest.fixture(scope="module")
def transformers_grid() -> Callable[..., tuple[int, int]]:
    """transformers' own choice of a grid; its module needs torchvision, the function does not."""
    import transformers

    folder = Path(transformers.__file__).parent / "models/nemotron_h_omni"
    source = (folder / "image_processing_nemotron_h_omni.py").read_text(encoding="utf-8")
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "get_patch_grid_size"
    )
    names: dict[str, Any] = {"math": math}
    exec(compile(ast.Module([function], []), "transformers", "exec"), names)
    chosen: Callable[..., tuple[int, int]] = names["get_patch_grid_size"]
    return chosen


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("least", "most"), [(1024, 13312), (16, 256), (64, 66), (4, 0)])
def test_grids_of_nemotron_omni_are_those_of_transformers(
    transformers_grid: Callable[..., tuple[int, int]], least: int, most: int, shuffle: bool
) -> None:
    config = ImageConfig(
        patch_dim=16,
        min_patches=least,
        max_patches=most,
        pixel_shuffle=shuffle,
        grid_rule="nemotron-omni",
    )
    random = np.random.default_rng(least)
    sizes = np.exp(random.uniform(0, np.log(4000), (2000, 2))).astype(int)
    sizes[::4] = 16 * (1 + sizes[::4] // 16)
    expected, found = [], []
    for width, height in sizes.tolist():
        bounds = {"min_num_patches": least, "max_num_patches": most or 10**12}
        try:
            theirs = transformers_grid(height, width, 16, config.grid_unit, **bounds)
        except ZeroDivisionError:
            theirs = (0, 0)
        # The shorter side of a long thin image may come to nothing.
        if theirs[0] * theirs[1]:
            expected.append(theirs)
            found.append(image_grids(width, height, config)[0])
    assert found == expected
    assert len(found) > 1500


def test_images_of_nemotron_omni_are_resized_without_rounding() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    rounding = encode_image(Image.fromarray(noise), ImageConfig(), with_patches=True)
    assert rounding.patches is not None and rounding.patches.dtype == np.uint8
    config = ImageConfig(grid_rule="nemotron-omni")
    found = encode_image(Image.fromarray(noise), config, with_patches=True)
    assert found.grids == ((4, 6),) and found.patches is not None
    assert found.patches.dtype == np.float32
    assert found.patches.min() < -1 and found.patches.max() > 256
    # Pillow has the same filter, in float32 for images of one channel.
    for channel in range(3):
        plane = Image.fromarray(noise[..., channel].astype(np.float32), mode="F")
        resized = np.asarray(plane.resize((48, 32), Image.Resampling.BICUBIC))
        patches = found.patches.reshape(4, 6, 3, 8, 8)[:, :, channel]
        assert np.abs(patches.transpose(0, 2, 1, 3).reshape(32, 48) - resized).max() < 0.01
    whole = encode_image(Image.fromarray(noise[:16, :32]), config, with_patches=True)
    assert whole.patches is not None and whole.patches.dtype == np.uint8
    packed = pack_images([found, whole], config)
    assert packed is not None and packed.patches.dtype == torch.float32


def test_a_thread_of_an_image_keeps_both_sides() -> None:
    config = ImageConfig(patch_dim=16, max_patches=256, grid_rule="nemotron-omni")
    for size in ((16 * 5000, 16), (1, 10**6)):
        grid_h, grid_w = nemotron_omni_grid(*size, config)
        assert grid_h >= 2 and grid_w >= 2 and grid_h * grid_w <= 256


def test_fixed_resolution_ignores_the_image() -> None:
    config = ImageConfig(dynamic_resolution=False, patch_dim=8, img_h=32, img_w=64)
    assert image_grids(999, 3, config) == ((4, 8),)
    assert rows_for(999, 3, config) == 8


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([2, 8]))
def test_patches_put_back_together_are_the_image(grid_h: int, grid_w: int, patch: int) -> None:
    shape = (grid_h * patch, grid_w * patch, 3)
    pixels = np.random.default_rng(0).integers(0, 256, size=shape).astype(np.uint8)
    patches = patchify(pixels, patch)
    rebuilt = np.zeros_like(pixels)
    for index, values in enumerate(patches):
        row, column = divmod(index, grid_w)
        for channel in range(3):
            for y in range(patch):
                for x in range(patch):
                    value = values[channel * patch * patch + y * patch + x]
                    rebuilt[row * patch + y, column * patch + x, channel] = value
    np.testing.assert_array_equal(rebuilt, pixels)


def starts(grids: list[tuple[int, int]]) -> list[int]:
    """First token of each image: the shortest comes first, equal ones keep their order."""
    sizes = [height * width for height, width in grids]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    before = {
        image: sum(sizes[other] for other in order[:place]) for place, image in enumerate(order)
    }
    return [before[image] for image in range(len(sizes))]


def packed(grids: list[tuple[int, int]], **fields: object):
    config = ImageConfig(**fields)  # type: ignore[arg-type]
    patches = torch.zeros(sum(height * width for height, width in grids), 3 * 64)
    return pack_patches(patches, grids, config)


@given(grids)
def test_rows_gather_squares_in_raster_order(halves: list[tuple[int, int]]) -> None:
    grids = [(2 * height, 2 * width) for height, width in halves]
    expected = []
    for (height, width), start in zip(grids, starts(grids), strict=True):
        for row in range(0, height, 2):
            for column in range(0, width, 2):
                expected += [
                    start + (row + dy) * width + column + dx for dy in (0, 1) for dx in (0, 1)
                ]
    assert packed(grids, pixel_shuffle=True).row_index.tolist() == expected


@given(grids)
def test_without_pixel_shuffle_each_patch_is_a_row(grids: list[tuple[int, int]]) -> None:
    expected = [
        start + place
        for (height, width), start in zip(grids, starts(grids), strict=True)
        for place in range(height * width)
    ]
    assert packed(grids, pixel_shuffle=False).row_index.tolist() == expected


def encoded(width: int, height: int, config: ImageConfig, colour: tuple[int, int, int]):
    return encode_image(Image.new("RGB", (width, height), colour), config, with_patches=True)


def test_packing_concatenates_and_normalises() -> None:
    config = ImageConfig(patch_dim=8, pixel_shuffle=True)
    images = [encoded(16, 32, config, (255, 0, 0)), encoded(48, 16, config, (0, 0, 255))]
    found = pack_images(images, config)
    assert found is not None
    assert found.patches.shape == (8 + 12, 3 * 64)
    assert found.patches.dtype == torch.float32
    assert found.cu_seqlens.tolist() == [0, 8, 20]
    assert found.cu_seqlens.dtype == torch.int32
    assert found.max_seqlen == 12
    assert found.patch_slots.dtype == found.row_index.dtype == torch.int64
    # The constants that transformers gives for CLIP.
    red = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, -0.40821073 / 0.27577711]
    for channel, value in enumerate(red):
        part = found.patches[:8, channel * 64 : (channel + 1) * 64]
        torch.testing.assert_close(part, torch.full_like(part, value))


def test_packing_no_image_is_none() -> None:
    assert pack_images([], ImageConfig()) is None


def test_packing_needs_pixels() -> None:
    with pytest.raises(AssertionError, match="without patches"):
        pack_images([EncodedImage(((2, 2),), 1, None)], ImageConfig())


def test_pixels_stay_away_where_only_rows_are_needed() -> None:
    image = encode_image(Image.new("RGB", (32, 32)), ImageConfig(), with_patches=False)
    assert image == EncodedImage(((4, 4),), 4, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_dim": 0}, "patch_dim is 0"),
        ({"min_patches": 0}, "min_patches is 0"),
        ({"min_patches": 9, "max_patches": 8}, "--dynamic-resolution-max-patches is 8: .* 9"),
        ({"min_patches": 1, "max_patches": 2}, "--dynamic-resolution-max-patches is 2: .* 4"),
        ({"dynamic_resolution": False, "img_h": 40}, "--img-h is 40: expected a multiple of 16"),
    ],
)
def test_bad_settings_name_the_flag(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageConfig(**fields)  # type: ignore[arg-type]
