"""Indices of packed images against torch and megatron-core."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from megatron_mimo.media.images import (
    EncodedImage,
    ImageConfig,
    decode_image,
    encode_image,
    examine_image,
    image_grids,
    pack_images,
    rows_for,
)
from megatron_mimo.media.images.grid import tile_layout
from megatron_mimo.media.images.packing import cropped_taps, pack_patches, position_taps

GRIDS = [(1, 1), (3, 5), (64, 128), (8, 8), (9, 2), (1, 200), (3, 5)]


def look_up(table: torch.Tensor, index: np.ndarray, weight: np.ndarray) -> torch.Tensor:
    """[T, C], by the definition."""
    return (table[torch.from_numpy(index)] * torch.from_numpy(weight)[..., None]).sum(1)


@pytest.mark.parametrize("side", [1, 2, 8, 128])
def test_positions_are_those_of_torch_interpolate(side: int) -> None:
    table = torch.randn(side, side, 3, generator=torch.Generator().manual_seed(0))
    found = look_up(table.flatten(0, 1), *position_taps(np.array(GRIDS), side))
    start = 0
    for height, width in GRIDS:
        longest = max(height, width)
        whole = F.interpolate(
            rearrange(table, "y x c -> 1 c y x"),
            size=(longest, longest),
            mode="bilinear",
            align_corners=False,
        )
        wanted = rearrange(whole[0, :, :height, :width], "c y x -> (y x) c")
        torch.testing.assert_close(found[start : start + height * width], wanted)
        start += height * width
    assert start == len(found)


def test_crops_are_those_of_grid_sample() -> None:
    side, grids = 16, [(4, 6), (9, 9), (2, 30)]
    draws = np.random.default_rng(1).random((len(grids), 4))
    table = torch.randn(side, side, 3, generator=torch.Generator().manual_seed(0))
    found = look_up(table.flatten(0, 1), *cropped_taps(np.array(grids), side, draws))
    start = 0
    for (height, width), draw in zip(grids, torch.from_numpy(draws), strict=True):
        # As in the training mode of megatron-core's RADIOViTModel._get_pos_embeddings.
        least = 0.1**0.5
        scale = draw[0] * (1 - least) + least
        low = torch.tensor(3 / 4, dtype=torch.float64).log()
        aspect = torch.exp(draw[1] * (-low - low) + low)
        extent = torch.stack([scale * aspect, scale / aspect]).clamp(0, 1)
        origin = draw[2:].flip(0) * (1 - extent)
        across, down = (torch.linspace(0, 1, n, dtype=torch.float64) for n in (width, height))
        points = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)
        points = (points * extent + origin) * 2 - 1
        wanted = F.grid_sample(
            rearrange(table, "y x c -> 1 c y x").double(), points[None], align_corners=True
        )
        wanted = rearrange(wanted, "1 c y x -> (y x) c").float()
        torch.testing.assert_close(
            found[start : start + height * width], wanted, rtol=1e-4, atol=1e-4
        )
        start += height * width


def test_crops_differ_by_seed_and_not_by_company() -> None:
    config = ImageConfig(position_crop=True)
    images = [
        encode_image(Image.new("RGB", size), config, with_patches=True)
        for size in ((32, 48), (64, 16))
    ]
    both, alone = pack_images(images, config, [5, 6]), pack_images(images[1:], config, [6])
    other = pack_images(images[1:], config, [7])
    assert both is not None and alone is not None and other is not None
    last = len(alone.patches)
    assert both.position_index[-last:].equal(alone.position_index)
    assert both.position_weight[-last:].equal(alone.position_weight)
    assert not alone.position_weight.equal(other.position_weight)


def test_tokens_hold_every_class_token_and_patch_once() -> None:
    config = ImageConfig(class_token_len=3, pixel_shuffle=False)
    total = sum(height * width for height, width in GRIDS)
    packed = pack_patches(torch.zeros(total, 192), GRIDS, config)
    assert packed.num_tokens == total + 3 * len(GRIDS)
    slots = torch.cat([packed.patch_slots, packed.class_slots])
    assert slots.sort().values.tolist() == list(range(packed.num_tokens))
    assert list(packed.lengths) == sorted(packed.lengths) == packed.cu_seqlens.diff().tolist()
    assert packed.max_seqlen == 64 * 128 + 3
    # Each piece's patches lie in one segment, in order, right behind its class tokens.
    starts = packed.class_slots.view(-1, 3)
    assert sorted(starts[:, 0].tolist()) == packed.cu_seqlens[:-1].tolist()
    place = 0
    for (height, width), first in zip(GRIDS, starts[:, 2].tolist(), strict=True):
        mine = packed.patch_slots[place : place + height * width]
        assert mine.tolist() == list(range(first + 1, first + 1 + height * width))
        place += height * width


def merged(patches: torch.Tensor, grids: list[tuple[int, int]], order: str) -> torch.Tensor:
    config = ImageConfig(class_token_len=1, row_order=order)  # type: ignore[arg-type]
    packed = pack_patches(torch.zeros(len(patches), 192), grids, config)
    tokens = patches.new_zeros(packed.num_tokens, patches.size(1))
    tokens[packed.patch_slots] = patches
    return tokens[packed.row_index].view(len(patches) // 4, -1)


def pixel_shuffles() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ours and megatron-core's rows of the same patches, in both orders; runs on a rank."""
    from megatron.core.models.multimodal.llava_model import pixel_shuffle

    pairs = []
    for order, grid in (("nemotron", (6, 6)), ("megatron", (4, 10))):
        patches = torch.randn(grid[0] * grid[1], 5)
        sizes = {} if order == "nemotron" else {"h": grid[0], "w": grid[1]}
        pairs.append((merged(patches, [grid], order), pixel_shuffle(patches[None], **sizes)[0]))
    return pairs


def test_rows_are_those_of_megatron_core(run_ranks) -> None:
    for ours, theirs in run_ranks(1, pixel_shuffles)[0]:
        assert ours.equal(theirs)


def test_rows_from_the_header_are_the_rows_produced() -> None:
    random = np.random.default_rng(11)
    for _ in range(10_000):
        width, height = (int(side) for side in np.exp(random.uniform(0, np.log(300), 2)))
        config = random_config(random)
        file = io.BytesIO()
        Image.new("L", (width, height)).save(file, "BMP")
        from_header = rows_for(*examine_image(file.getvalue()), config)
        image = encode_image(decode_image(file.getvalue()), config, with_patches=True)
        assert image.patches is not None
        assert from_header == image.rows == len(image.patches) // config.patches_per_row
        assert from_header >= 1


def random_config(random: np.random.Generator) -> ImageConfig:
    patch, shuffle = int(random.choice([2, 4, 16])), bool(random.integers(2))
    mode = random.integers(3)
    if mode == 0:
        least = int(random.integers(1, 20))
        most = int(random.choice([0, max(4, least), max(4, least) + random.integers(100)]))
        return ImageConfig(
            patch_dim=patch, pixel_shuffle=shuffle, min_patches=least, max_patches=most
        )
    tiles = {"use_tiling": True, "max_num_tiles": int(random.integers(1, 7))} if mode == 1 else {}
    return ImageConfig(
        patch_dim=patch,
        pixel_shuffle=shuffle,
        dynamic_resolution=False,
        img_h=32,
        img_w=64,
        use_thumbnail=bool(mode == 1 and random.integers(2)),
        **tiles,  # type: ignore[arg-type]
    )


TILES = ImageConfig(
    dynamic_resolution=False,
    img_h=16,
    img_w=16,
    use_tiling=True,
    max_num_tiles=6,
    use_thumbnail=True,
    pixel_shuffle=False,
)


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        ((100, 100), (2, 2)),
        ((10, 10), (1, 1)),
        ((300, 100), (1, 3)),
        ((100, 300), (3, 1)),
        ((300, 200), (2, 3)),
        ((1000, 5), (1, 6)),
        ((5, 1000), (6, 1)),
    ],
)
def test_tiles_take_the_nearest_shape(size: tuple[int, int], layout: tuple[int, int]) -> None:
    assert tile_layout(*size, TILES) == layout
    rows, columns = layout
    pieces = rows * columns + (rows * columns > 1)
    assert image_grids(*size, TILES) == ((2, 2),) * pieces
    assert rows_for(*size, TILES) == 4 * pieces


def test_tiles_are_cut_in_raster_order_and_the_thumbnail_is_last() -> None:
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, 16:] = 200
    image = encode_image(Image.fromarray(pixels), TILES, with_patches=True)
    assert image.patches is not None
    left, right, thumbnail = np.split(image.patches, 3)
    assert (left == 0).all() and (right == 200).all()
    assert thumbnail[0].mean() < 30 and thumbnail[1].mean() > 170


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 200), (2000, 10)])
def test_tiny_and_long_images_keep_to_the_budget(size: tuple[int, int]) -> None:
    config = ImageConfig(patch_dim=16, min_patches=4, max_patches=64)
    ((height, width),) = image_grids(*size, config)
    assert 4 <= height * width <= 64
    if max(size) > 100:
        assert max(height, width) / min(height, width) >= 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_tiling": True}, "--use-tiling with --dynamic-resolution"),
        (
            {"dynamic_resolution": False, "use_thumbnail": True},
            "--use-thumbnail needs --use-tiling",
        ),
        ({"dynamic_resolution": False, "max_num_tiles": 2}, "--max-num-tiles needs --use-tiling"),
        ({"max_num_tiles": 0}, "max_num_tiles is 0"),
        ({"class_token_len": -1}, "class_token_len is -1"),
    ],
)
def test_bad_modes_name_the_flag(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageConfig(**fields)  # type: ignore[arg-type]


def test_no_image_is_none() -> None:
    assert pack_images([], ImageConfig()) is None


def test_equal_images_need_equal_seeds_to_look_alike() -> None:
    """A count of seeds that does not fit the images is an error, never a shift by one."""
    config = ImageConfig(position_crop=True)
    image = EncodedImage(((2, 2),), 1, np.zeros((4, 192), dtype=np.uint8))
    with pytest.raises(ValueError):
        pack_images([image, image], config, [1])
