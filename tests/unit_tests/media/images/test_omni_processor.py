"""Images of `--load-hf` of Nemotron H Omni models against transformers' image processor."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_mimo.media.images import ImageConfig, encode_image, pack_images

# As many as were counted before there was a rule for these models: it differed for 1,321.
NUMBER = 2000


def processor(config: ImageConfig) -> Any:
    from transformers.models.nemotron_h_omni.image_processing_nemotron_h_omni import (
        NemotronH_Omni_Reasoning_V3ImageProcessor as Processor,
    )

    return Processor(
        patch_size=config.patch_dim,
        min_num_patches=config.min_patches,
        max_num_patches=config.max_patches,
        image_mean=config.pixel_mean,
        image_std=config.pixel_std,
    )


@pytest.mark.parametrize(("least", "most"), [(64, 400), (4, 200)])
def test_images_are_those_of_the_processor(least: int, most: int) -> None:
    config = ImageConfig(
        patch_dim=4, min_patches=least, max_patches=most, grid_rule="nemotron-omni"
    )
    theirs = processor(config)
    random = np.random.default_rng(2000)
    sizes = np.exp(random.uniform(np.log(4), np.log(160), (NUMBER, 2))).astype(int)
    different = []
    for number, (height, width) in enumerate(sizes.tolist()):
        with_pixels = number % 10 == 0
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours = encode_image(Image.fromarray(pixels), config, with_patches=with_pixels)
        made = theirs(Image.fromarray(pixels), return_tensors="pt")
        if list(ours.grids[0]) != made["image_grid_hw"][0].tolist():
            different.append((height, width))
        elif with_pixels:
            packed = pack_images([ours], config)
            assert packed is not None
            # They divide by 255 and by the deviation at once.
            torch.testing.assert_close(packed.patches, made["pixel_values"], rtol=1e-5, atol=1e-5)
    assert not different
