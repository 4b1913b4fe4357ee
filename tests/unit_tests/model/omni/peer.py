"""Random omni folders, written by transformers, and samples to read."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.unit_tests.modules.hybrid.peer import BASE as LANGUAGE
from tests.unit_tests.modules.hybrid.peer import KINDS
from tests.unit_tests.modules.radio.peer import BASE as VISION
from tests.unit_tests.modules.radio.peer import PATCH

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_TOKEN = 7
AUDIO: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "subsampling_conv_channels": 8,
    "num_mel_bins": 16,
    "projection_hidden_size": 24,
    "projection_bias": False,
}
# Patch rows and columns of each sample's images, which come at random places.
SAMPLES = [[(2, 4), (6, 2), (2, 2)], [], [(4, 8)]]


def write_omni(
    folder: Path | str,
    pattern: str,
    *,
    audio: bool = True,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    frames: int = 2,
) -> Any:
    """A random `NemotronH_Omni_Reasoning_V3` in evaluation mode, saved in a folder."""
    import torch
    from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(1)
    kinds = [KINDS[letter] for letter in pattern]
    language = LANGUAGE | {"model_type": "nemotron_h", "layers_block_type": kinds} | (text or {})
    radio = VISION | {"model_type": "radio", "video_temporal_patch_size": frames} | (vision or {})
    model = NemotronH_Omni_Reasoning_V3(
        NemotronH_Omni_Reasoning_V3_Config(
            vision_config=radio,
            text_config=language,
            audio_config=AUDIO | {"model_type": "parakeet_encoder"} if audio else None,
            projector_hidden_size=40,
            video_temporal_patch_size=frames,
            vision_hidden_size=radio["hidden_size"],
            image_token_id=IMAGE_TOKEN,
            video_token_id=8,
            audio_token_id=9,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # What transformers starts as a constant; scales behind layers stay ones.
            if parameter.dim() == 1 and "lambda1" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            if "multi_modal_projector.linear" in name:
                parameter.normal_(0, 0.2)
            if name.endswith("gate.weight"):
                parameter.normal_(0, 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    model.eval().save_pretrained(folder)
    return model


def random_samples() -> "tuple[Tensor, Tensor, list[Tensor]]":
    """Tokens and labels [B, S] of `SAMPLES`, and all their images."""
    import torch

    random = torch.Generator().manual_seed(2)
    ids = torch.randint(10, LANGUAGE["vocab_size"], (len(SAMPLES), 40), generator=random)
    images = []
    for tokens, grids in zip(ids, SAMPLES, strict=True):
        rows = sum(height * width // 4 for height, width in grids)
        # Not even an image's tokens have to be neighbours.
        places = torch.randperm(len(tokens) - 4, generator=random)[:rows]
        tokens[places] = IMAGE_TOKEN
        images += [
            torch.rand(3, height * PATCH, width * PATCH, generator=random)
            for height, width in grids
        ]
    labels = ids.clone()
    labels[ids == IMAGE_TOKEN] = -100
    labels[:, :3] = -100
    # Padding on the right.
    labels[1, -5:] = -100
    ids[1, -5:] = LANGUAGE["pad_token_id"]
    return ids, labels, images


def theirs_of(model: Any, ids: "Tensor", labels: "Tensor", images: "list[Tensor]") -> Any:
    """What transformers' model computes of samples."""
    import torch

    vision = model.config.vision_config
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (vision.norm_mean, vision.norm_std))
    size = vision.patch_size
    inputs = {}
    if images:
        # As transformers' image processor, which needs torchvision: patches in raster order, each
        # (channel, y, x).
        inputs["pixel_values"] = torch.cat(
            [
                torch.nn.functional.unfold(((image - mean) / std)[None], size, stride=size)[0].T
                for image in images
            ]
        )
        inputs["image_grid_hw"] = torch.tensor(
            [[image.shape[1] // size, image.shape[2] // size] for image in images]
        )
    return model(input_ids=ids, labels=labels, use_cache=False, **inputs)
