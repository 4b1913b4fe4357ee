"""Images as the items of a module: the implementation of `data.inputs.ItemInput`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from megatron_mimo.media.images.config import ImageConfig
from megatron_mimo.media.images.decode import (
    ImageSource,
    decode_or_blank,
    examine_image,
)
from megatron_mimo.media.images.encode import EncodedImage, encode_image
from megatron_mimo.media.images.grid import image_grids, rows_of
from megatron_mimo.media.images.mock import check_mock_rows, mock_pictures
from megatron_mimo.media.images.packing import PackedImages, grids_of, pack_images
from megatron_mimo.media.items import ItemWords, MockItems, OneRunItems
from megatron_mimo.media.video.clip import EncodedVideo

ImageTagType = Literal["internvl"]
Size = tuple[int, int]

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "ppm")
"""Endings of the files that stored samples hold images in."""
_TAGS: dict[ImageTagType | None, tuple[str, str]] = {
    None: ("", ""),
    "internvl": ("<img>", "</img>"),
}
_KNOWN = "expected <img> and </img>, or nothing"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInput(OneRunItems):
    """The items of a module that takes images.

    Attributes:
        config: Conversion of an image to patches.
        placeholder: Placeholder of an image in texts, and the token that its rows replace.
        tag_type: Kind of tags: "internvl" writes <img> and </img> around each image; None writes
            nothing.
        mock_rows: Number of rows of every mock image; None for images of any size.
        noun: Name of one image in messages, and of its field in stored samples.
    """

    config: ImageConfig = field(default_factory=ImageConfig)
    placeholder: str = "<image>"
    tag_type: ImageTagType | None = None
    mock_rows: int | None = None
    noun: str = "image"

    @property
    def words(self) -> ItemWords:
        """Names of images in messages and stored samples."""
        return ItemWords(
            noun=self.noun,
            article="an" if self.noun[0] in "aeiou" else "a",
            placeholder="--image-token",
            tags=f"--image-tag-type {self.tag_type}",
            smaller="lower --dynamic-resolution-max-patches",
        )

    @property
    def tags(self) -> tuple[str, str]:
        """Texts that are written before and after an image; may be empty."""
        return _TAGS[self.tag_type]

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of image files in stored samples, in lower case."""
        return IMAGE_ENDINGS

    @property
    def item_type(self) -> type[EncodedImage]:
        """Type of the result of `encode`."""
        return EncodedImage

    @property
    def packed_type(self) -> type[PackedImages]:
        """Type of the result of `pack`."""
        return PackedImages

    def examine(self, source: ImageSource) -> Size:
        """Width and height in pixels, upright, from the header of a file that appears complete.

        Raises:
            BrokenImageError: The file is corrupt, truncated, or not an image.
        """
        return examine_image(source)

    def encode(
        self, source: ImageSource, shape: Size, *, with_content: bool
    ) -> tuple[EncodedImage, str | None]:
        """Cut an image into patches.

        Args:
            source: Contents of an image file, or pixels, uint8 [H, W, 3].
            shape: Width and height in pixels, from `examine`.
            with_content: Whether to keep the pixels; otherwise they are not decoded.

        Returns:
            The image, and the reason if a blank of its size replaces it: the header has determined
            the rows, so an image that appears complete but cannot be decoded still has them.
        """
        if not with_content:
            grids = image_grids(*shape, self.config)
            return EncodedImage(grids, rows_of(grids, self.config), None), None
        pixels, reason = decode_or_blank(source, shape)
        return encode_image(pixels, self.config, with_patches=True), reason

    def lengths(self, item: EncodedImage | EncodedVideo) -> tuple[int, ...]:
        """Number of tokens of each piece, of an image or of a video of the same module."""
        extra = self.config.class_token_len
        return tuple(rows * columns + extra for rows, columns in grids_of(item))

    def pack(
        self, items: Sequence[EncodedImage | EncodedVideo], seeds: Sequence[int]
    ) -> PackedImages | None:
        """Pack images, and videos of the same module, one after the other; None for no item.

        Args:
            items: Images and videos with patches, in manifest order.
            seeds: Seed of each item's augmentation.
        """
        return pack_images(items, self.config, seeds)

    def without_augmentation(self) -> "ImageInput":
        """The same settings without augmentation, as evaluation reads."""
        return replace(self, config=replace(self.config, position_crop=False))

    def mock(self, rng: np.random.Generator, room: int) -> MockItems:
        """One or two noisy pictures of one colour each, and the question which colours they are.

        Args:
            rng: Random generator of all choices.
            room: Number of positions that the pictures, their tags and the texts may take.
        """
        pictures, names = mock_pictures(
            rng, room, self.config, rows=self.mock_rows, tag_bytes=self._tag_bytes
        )
        noun = "Colour?" if len(names) == 1 else "Colours?"
        return MockItems(
            sources=pictures,
            question=self.placeholder * len(names) + noun,
            answer=" ".join(names),
        )

    def check_mock(self, room: int) -> None:
        """Refuse a number of rows that images cannot have, or sequences cannot hold.

        Args:
            room: Number of positions of a sequence for items, their tags and the texts.

        Raises:
            ValueError: The image settings give another number of rows, or the rows do not fit.
        """
        if self.mock_rows is not None:
            check_mock_rows(self.mock_rows, room, self.config, tag_bytes=self._tag_bytes)

    @property
    def _tag_bytes(self) -> int:
        return len("".join(self.tags))


def tags_of(kind: ImageTagType | None) -> tuple[str, str]:
    """Texts before and after an image; empty without tags."""
    return _TAGS[kind]


def tag_type(tags: tuple[str, str], where: str) -> ImageTagType | None:
    """The kind of tags that are these texts; None for no tags.

    Args:
        tags: Texts before and after an image.
        where: Where they were found, for the message.

    Raises:
        ValueError: No kind has these texts.
    """
    for kind, known in _TAGS.items():
        if tags == known:
            return kind
    raise ValueError(f"{where} writes {tags[0]!r} and {tags[1]!r} around an image: {_KNOWN}")
