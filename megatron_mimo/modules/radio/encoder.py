"""RADIO in one process without a launcher: features of images, from a folder of weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_mimo.media.images import Grid, PackedImages
from megatron_mimo.media.images.packing import normalise, pack_patches
from megatron_mimo.modules.radio.config import RadioConfig
from megatron_mimo.runtime import prepare_megatron_core, resolve_device
from megatron_mimo.runtime.staging import map_tensors
from megatron_mimo.weights.folder import WeightFolder, write_folder


class RadioEncoder(nn.Module):
    """A whole RADIO vision transformer; `from_pretrained` makes one.

    Gradients flow to its parameters and to the images. `freeze` stops those to the parameters.

    Attributes:
        config: Architecture of the module.
        vit: Vision transformer over packed images.
    """

    def __init__(self, config: RadioConfig, vit: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.vit = vit

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str = "auto",
    ) -> "RadioEncoder":
        """Load a folder as transformers' `RadioModel` writes it, such as C-RADIO v4's.

        Import this package before anything that imports megatron-core: on a host it has to be
        adapted first.

        Args:
            folder: Path to a folder with config.json and safetensors.
            dtype: Dtype of the parameters and features; None keeps that of the weights.
            device: Kind of device: "auto" takes a GPU where there is one, else "cpu" or "cuda".

        Raises:
            ValueError: A file is missing or damaged, weights are missing or unexpected (the
                message lists them), or the architecture is not supported.
        """
        from megatron_mimo.modules.radio.weights import load_weights, names_of, read_config

        where = resolve_device(device)
        prepare_megatron_core(where)
        with WeightFolder(folder) as weights:
            config = read_config(weights)
            stored = weights.dtype(names_of(weights).position)
            vit = _build(config, dtype or stored)
            load_weights(vit, config, weights, tp_rank=0, tp_size=1)
        return cls(config, vit.to(where.torch)).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that transformers' `RadioModel` loads, where there is no final norm."""
        from megatron_mimo.modules.radio.weights import export_weights, write_config

        write_folder(folder, write_config(self.config), export_weights(self.vit, self.config))

    def freeze(self) -> "RadioEncoder":
        """Freeze all parameters, and stay in evaluation mode whatever `train` is called with."""
        self.vit.freeze()  # type: ignore[operator]
        return self

    def features(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Features of every patch, after the final norm where the weights have one.

        Args:
            images: Images, each float [3, H, W] in [0, 1]; sides are multiples of the patch size.
                One pass computes images of different sizes.

        Returns:
            Features of each image [patches, C] in raster order, without class tokens, in the
            encoder's dtype.

        Raises:
            ValueError: An image has another shape or dtype; the message names it.
        """
        packed, grids = self._pack(images, side=self.config.patch_dim, shuffle=False)
        if packed is None:
            return []
        tokens: Tensor = self.vit(packed)
        patches = tokens.index_select(0, packed.patch_slots)
        return list(patches.split([rows * columns for rows, columns in grids]))

    def rows(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Rows as the projector receives them: features after pixel shuffle.

        Args:
            images: Images as in `features`; with pixel shuffle, sides are multiples of two patches.

        Returns:
            Rows of each image [patches / 4, 4 * C], or [patches, C] without pixel shuffle, in the
            encoder's dtype.

        Raises:
            ValueError: An image has another shape or dtype; the message names it.
        """
        from megatron_mimo.modules.radio.embedding import gather_rows

        merge = 4 if self.config.pixel_shuffle else 1
        side = self.config.patch_dim * (2 if self.config.pixel_shuffle else 1)
        packed, grids = self._pack(images, side=side, shuffle=self.config.pixel_shuffle)
        if packed is None:
            return []
        found = gather_rows(self.vit(packed), packed.row_index, self.config.row_size)
        return list(found.split([rows * columns // merge for rows, columns in grids]))

    def _pack(
        self, images: Sequence[Tensor], *, side: int, shuffle: bool
    ) -> tuple[PackedImages | None, list[Grid]]:
        for number, image in enumerate(images):
            _check(image, number, side)
        if not images:
            return None, []
        patch = self.config.patch_dim
        device = next(self.vit.parameters()).device
        grids = [(image.shape[1] // patch, image.shape[2] // patch) for image in images]
        patches = torch.cat([_patchify(image.to(device), patch) for image in images])
        settings = replace(self.config.image_config(), pixel_shuffle=shuffle)
        packed = pack_patches(normalise(patches, settings), grids, settings)
        return map_tensors(packed, lambda tensor: tensor.to(device)), grids


def _build(config: RadioConfig, dtype: torch.dtype) -> nn.Module:
    from megatron_mimo.modules.radio.vit import RadioVit
    from megatron_mimo.runtime.solo import solo_groups, solo_world

    with solo_world():
        return RadioVit(config, solo_groups(), dtype, initialize=False)


def _check(image: Tensor, number: int, side: int) -> None:
    if image.dim() != 3 or image.size(0) != 3 or not image.is_floating_point():
        raise ValueError(
            f"image {number} is {image.dtype} {list(image.shape)}: expected a float [3, H, W] "
            f"with values in [0, 1]"
        )
    height, width = image.shape[1:]
    if height < side or width < side or height % side or width % side:
        raise ValueError(
            f"image {number} is {width} x {height} pixels: expected sides that are multiples of "
            f"{side}; resize it first"
        )


def _patchify(image: Tensor, patch: int) -> Tensor:
    """[3, H, W] to [patches, 3 * P * P], each patch (channel, y, x)."""
    channels, height, width = image.shape
    tiles = image.reshape(channels, height // patch, patch, width // patch, patch)
    return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1)
