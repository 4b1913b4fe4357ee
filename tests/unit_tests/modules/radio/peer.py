"""Random RADIO folders, written by transformers, and images to encode."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PATCH = 4
BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "mlp_ratio": 2.0,
    "patch_size": PATCH,
    "max_img_size": 32,
    "num_cls_tokens": 3,
    "num_registers": 2,
    # Far from the usual 0.02, so that every weight matters.
    "initializer_range": 0.2,
}
GRIDS = [(1, 1), (3, 5), (64, 128), (8, 8), (9, 2), (3, 5), (1, 40)]


def write_radio(folder: Path | str, **fields: Any) -> Any:
    """A random `RadioModel` in evaluation mode, saved in a folder."""
    import torch
    from transformers import RadioConfig, RadioModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(1)
    model = RadioModel(RadioConfig(**BASE | fields)).eval()
    with torch.no_grad():
        # transformers starts biases at zero and norms at one.
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ".norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def random_images(grids: list[tuple[int, int]], patch: int = PATCH) -> "list[Tensor]":
    """[3, H, W] in [0, 1]."""
    import torch

    random = torch.Generator().manual_seed(2)
    return [
        torch.rand(3, height * patch, width * patch, generator=random) for height, width in grids
    ]


def difference(found: "Tensor", wanted: "Tensor") -> float:
    """Largest absolute difference, relative to the largest value."""
    assert found.shape == wanted.shape
    return float((found - wanted).detach().abs().max() / wanted.abs().max())
