"""Images of a folder's processor as the items of a module: `data.inputs.ItemInput`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mimo.media.images import IMAGE_ENDINGS, ImageSource, blank_image, examine_image
from megatron_mimo.media.images.decode import decode_or_blank
from megatron_mimo.media.images.mock import COLOURS, TEXT_BUDGET, coloured_picture
from megatron_mimo.media.items import BrokenItemError, ItemWords, Layout, MockItems, Run
from megatron_mimo.media.processors.family import FAMILIES, ItemTexts, ProcessorFamily, Settings
from megatron_mimo.media.processors.packed import Outline, ProcessedImage, ProcessedImages

# Sides of mock pictures in pixels.
_SIDES = (16, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorInput:
    """The items of a module whose images the processor of a folder makes.

    Attributes:
        folder: Path to the folder.
        model_type: Family of the folder's model.
        texts: How an image is written.
        placeholder: Placeholder of an image in stored samples.
        noun: Name of one image in messages, and of its field in stored samples.
        several: Whether images are those of samples with several.
        processor: The folder's processor, of which only the image processor is kept.
        settings: All settings of its image processor.
        given: Those of them that it gives with each call.
    """

    folder: str
    model_type: str
    texts: ItemTexts
    placeholder: str = "<image>"
    noun: str = "image"
    several: bool = False
    processor: Any = field(repr=False, compare=False)
    settings: Settings = field(repr=False, compare=False)
    given: Settings = field(repr=False, compare=False)

    @property
    def words(self) -> ItemWords:
        """Names of images in messages and stored samples."""
        return ItemWords(
            noun=self.noun,
            article="an" if self.noun[0] in "aeiou" else "a",
            placeholder="--image-token",
            tags="--tokenizer-model",
            smaller=f"set a smaller image size in the processor's file in {self.folder}",
        )

    @property
    def token(self) -> str:
        """Token of the vocabulary that rows replace."""
        return self.texts.token

    @property
    def inline(self) -> str:
        """Text of an image where no chat template writes it."""
        return f"{self.texts.opens}{self.texts.token}{self.texts.closes}"

    @property
    def part(self) -> str | None:
        """Type of an image among the parts of a message, as chat templates know it."""
        return "image"

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that stand around and between rows."""
        found = (self.texts.before, self.texts.between, self.texts.after)
        return tuple(text for text in found if text)

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of image files in stored samples, in lower case."""
        return IMAGE_ENDINGS

    @property
    def item_type(self) -> type[ProcessedImage]:
        """Type of the result of `encode`."""
        return ProcessedImage

    @property
    def packed_type(self) -> type[ProcessedImages]:
        """Type of the result of `pack`."""
        return ProcessedImages

    @property
    def family(self) -> ProcessorFamily:
        """What differs between families."""
        return FAMILIES[self.model_type]

    def among(self, count: int) -> "ProcessorInput":
        """The kind of the images of a sample that has this many.

        LLaVA-OneVision's processor cuts an image into tiles only where it is alone.
        """
        several = self.family.separates and count > 1
        return self if several == self.several else replace(self, several=several)

    def examine(self, source: ImageSource) -> Outline:
        """What the image's size decides, from the header of a file that appears complete.

        Raises:
            BrokenItemError: The file is corrupt, truncated or not an image, or has a size that the
                processor refuses.
        """
        width, height = examine_image(source)
        try:
            return self._outline(width, height)
        except ValueError as error:
            raise BrokenItemError(
                f"image of {width} x {height} pixels is not taken by the processor of "
                f"{self.folder}: {error}"
            ) from error

    def _outline(self, width: int, height: int) -> Outline:
        return self.family.outline(self.processor, self.settings, height, width, self.several)

    def encode(
        self, source: ImageSource, shape: Outline, *, with_content: bool
    ) -> tuple[ProcessedImage, str | None]:
        """Make of an image what the processor makes of it.

        Args:
            source: Contents of an image file, or pixels, uint8 [H, W, 3].
            shape: What its size decides, from `examine`.
            with_content: Whether to keep the pixels; otherwise they are not decoded.

        Returns:
            The image, and the reason if a blank of its size replaces it.
        """
        if not with_content:
            return self._item(shape, None), None
        picture, reason = decode_or_blank(source, shape.size)
        # A second image of the sample, where one is needed, takes no time.
        images = [[picture, blank_image(1, 1)] if self.several else [picture]]
        made = self.processor.image_processor(images, return_tensors="np", **self.given)
        content = {argument.name: argument.take(made, shape) for argument in self.family.arguments}
        return self._item(shape, content), reason

    def _item(self, outline: Outline, content: Mapping[str, Any] | None) -> ProcessedImage:
        return ProcessedImage(outline=outline, shares_sample=self.several, content=content)

    @property
    def feeds(self) -> None:
        """None: the images are those of the module of the kind's own name."""
        return None

    def runs(self, item: ProcessedImage) -> tuple[Run, ...]:
        """One run, without a text before it."""
        return (("", self.layout(item)),)

    def layout(self, item: ProcessedImage) -> Layout:
        """Lines of rows, with the texts of the processor around and between them."""
        texts = self.texts
        lines: list[str | int] = [texts.before]
        for number, line in enumerate(item.outline.lines):
            lines += [texts.between, line] if number else [line]
        return tuple(piece for piece in (*lines, texts.after) if piece)

    def lengths(self, item: ProcessedImage) -> tuple[int, ...]:
        """Number of tokens of the image, which is one segment."""
        return (item.outline.num_tokens,)

    def facts(self, item: ProcessedImage) -> Mapping[str, Sequence[int]]:
        """What the language model takes of an image beside its rows."""
        return item.outline.facts

    def pack(self, items: Sequence[ProcessedImage], seeds: Sequence[int]) -> ProcessedImages | None:
        """The arguments of `get_image_features` for several images; None for no image.

        Args:
            items: Images with content, in manifest order.
            seeds: Seed of each image; not used, since there is no augmentation.
        """
        if not items:
            return None
        # Those of samples with several come last, so that one number can count them.
        order = sorted(range(len(items)), key=lambda at: items[at].shares_sample)
        contents = []
        for at in order:
            content = items[at].content
            assert content is not None, "images were encoded without content"
            contents.append(content)
        tensors = {
            argument.name: argument.merge([content[argument.name] for content in contents])
            for argument in self.family.arguments
        }
        together = sum(item.shares_sample for item in items)
        tensors |= self.family.numbers(len(items) - together, together)
        return ProcessedImages(
            names=tuple(tensors),
            tensors=tuple(tensors.values()),
            lengths=tuple(item.outline.num_tokens for item in items),
            rows=tuple(item.rows for item in items),
            places=tuple(int(place) for place in np.argsort(order)),
        )

    def pictures(self, item: ProcessedImage) -> list[NDArray[np.uint8]]:
        """What the tower sees of an image with content: pixels, each uint8 [H, W, 3]."""
        assert item.content is not None, "the image was encoded without content"
        settings, made = self.settings, []
        for planes in self.family.pictures(item.content, settings):
            pixels = np.moveaxis(planes, 0, -1)
            if settings["do_normalize"]:
                pixels = pixels * settings["image_std"] + settings["image_mean"]
            made.append(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))
        return made

    def without_augmentation(self) -> "ProcessorInput":
        """The same settings: there is no augmentation."""
        return self

    def mock(self, rng: np.random.Generator, room: int) -> MockItems:
        """One or two noisy pictures of one colour each, and the question which colours they are.

        Args:
            rng: Random generator of all choices.
            room: Number of positions that the pictures, their texts and the question may take.
        """
        count = int(rng.integers(1, 3))
        fitting = self.among(count)._sizes((room - TEXT_BUDGET) // count)
        if not fitting:
            count, fitting = 1, self.among(1)._sizes(room - TEXT_BUDGET)
        names = tuple(COLOURS[rng.integers(len(COLOURS))] for _ in range(count))
        pictures = tuple(
            coloured_picture(name, fitting[rng.integers(len(fitting))], rng) for name in names
        )
        noun = "Colour?" if count == 1 else "Colours?"
        return MockItems(
            sources=pictures,
            question=self.placeholder * count + noun,
            answer=" ".join(names),
        )

    def check_mock(self, room: int) -> None:
        """Refuse a sequence without room for any mock picture.

        Args:
            room: Number of positions of a sequence for items, their texts and the question.

        Raises:
            ValueError: The picture with the fewest rows does not fit.
        """
        if not self._sizes(room - TEXT_BUDGET):
            least = min(self._positions(height, width) for height, width in _ALL_SIZES)
            raise ValueError(
                f"a mock {self.noun} of the processor of {self.folder} takes {least} positions, "
                f"its question {TEXT_BUDGET} more, and --seq-length leaves them {room}: raise it"
            )

    def _sizes(self, room: int) -> list[tuple[int, int]]:
        """Heights and widths of mock pictures that fit."""
        return [size for size in _ALL_SIZES if self._positions(*size) <= room]

    def _positions(self, height: int, width: int) -> int:
        layout = self.layout(self._item(self._outline(width, height), None))
        return sum(piece if isinstance(piece, int) else 1 for piece in layout)


_ALL_SIZES = tuple((height, width) for height in _SIDES for width in _SIDES)
