"""Rows of videos, among images, are those of transformers, and so are their gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.modules.radio.peer import PATCH, difference

# Sections of the vision encoder, numbers of frames that are embedded together, and a seed.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "two frames": ({}, 2),
    "three frames": ({"hidden_size": 80, "num_attention_heads": 5, "mlp_ratio": 3.0}, 3),
    "four frames, a small table": ({"max_img_size": 20, "hidden_act": "gelu_pytorch_tanh"}, 4),
}
# Grids, and numbers of frames; an image has none.
ITEMS = [((4, 6), 5), ((2, 2), None), ((2, 4), 1), ((6, 2), None), ((4, 4), 8)]


def compare(folder: Path, vision: dict[str, Any], frames: int) -> dict[str, float]:
    """Largest relative differences of rows, and of the gradient of each weight of the embedding."""
    import numpy as np
    import torch

    from megatron_mimo.media.images.encode import EncodedImage, patchify
    from megatron_mimo.media.images.packing import pack_images
    from megatron_mimo.media.video.clip import EncodedVideo
    from megatron_mimo.model.omni.whole import WholeOmni
    from tests.unit_tests.model.omni.peer import write_omni

    theirs = write_omni(
        folder,
        "*",
        audio=False,
        vision={"num_hidden_layers": 2, "video_temporal_patch_size": frames, **vision},
        frames=frames,
    )
    whole = WholeOmni(folder)
    encoder = whole._encoder
    settings = whole.config.image_config()
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (settings.pixel_mean, settings.pixel_std))
    random = np.random.default_rng(7)
    items: list[Any] = []
    wanted = []
    for (rows, columns), number in ITEMS:
        shape = (number or 1, rows * PATCH, columns * PATCH, 3)
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        normal = (torch.from_numpy(pixels).movedim(-1, -3).float() / 255 - mean) / std
        count = rows * columns // 4
        if number is None:
            items.append(EncodedImage(((rows, columns),), count, patchify(pixels[0], PATCH)))
            flat = torch.nn.functional.unfold(normal, PATCH, stride=PATCH)[0].T
            grid = torch.tensor([[rows, columns]])
            wanted += theirs.get_image_features(flat, grid, return_dict=True).pooler_output
            continue
        groups = -(-number // frames)
        filled = np.concatenate([pixels, *[pixels[-1:]] * (groups * frames - number)])
        cut = [
            np.concatenate([patchify(f, PATCH) for f in g], axis=1)
            for g in filled.reshape(groups, frames, *shape[1:])
        ]
        items.append(
            EncodedVideo(
                grid=(rows, columns),
                labels=("",) * groups,
                rows=groups * count,
                patches=np.concatenate(cut).astype(np.float32),
            )
        )
        wanted += theirs.get_video_features(normal, return_dict=True).pooler_output
    packed = pack_images(items, settings)
    assert packed is not None
    found, expected = encoder(packed), torch.cat(list(wanted))
    found.square().sum().backward()
    expected.square().sum().backward()
    embeddings = theirs.vision_model.embeddings
    assert encoder.video is not None
    return {
        "rows": difference(found, expected),
        "video": difference(
            encoder.video.projection.weight.grad, embeddings.video_patch_projection.weight.grad
        ),
        "image": difference(
            encoder.vision.embedding.projection.weight.grad,
            embeddings.patch_projection.weight.grad,
        ),
        "position": difference(
            encoder.vision.embedding.position.grad, embeddings.position_embedding.grad[0]
        ),
    }


@pytest.mark.parametrize("name", CASES)
def test_rows_and_gradients(name: str, run_ranks: Callable[..., list], tmp_path: Path) -> None:
    vision, frames = CASES[name]
    ((found),) = run_ranks(1, compare, tmp_path, vision, frames)
    assert max(found.values()) < 1e-5, found
