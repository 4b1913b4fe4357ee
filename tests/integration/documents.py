"""Documents made of random tokens and pixels, for tests that say what a sequence holds."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from megatron_mimo.data.samples.sample import EncodedSample


@dataclass(frozen=True)
class Document:
    """What a document is made of.

    Attributes:
        text: Number of text tokens, the last five of which are targets.
        grids: Patch rows and columns of each image, in front of the text.
        seed: Of tokens and pixels.
        apart: Whether two thirds of the text lie between the first image and the others, so that
            rows are spread over the sequence's shards.
    """

    text: int
    grids: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    apart: bool = False


def encode(document: Document, name: str) -> "EncodedSample":
    """The document as the loader gets it: patches of 8 x 8 pixels, four to a row."""
    from megatron_mimo.data.samples.sample import EncodedSample
    from megatron_mimo.data.text.tokenizer import ByteTokenizer
    from megatron_mimo.media.images.encode import EncodedImage

    random = np.random.default_rng(document.seed)
    images = []
    for height, width in document.grids:
        pixels = random.integers(0, 256, (height * width, 3 * 8 * 8), dtype=np.uint8)
        images.append(EncodedImage(((height, width),), height * width // 4, pixels))
    text = random.integers(0, 256, document.text)
    first, *others = [
        np.full(image.rows, ByteTokenizer().placeholder_ids["encoder"]) for image in images
    ] or [text[:0]]
    between = 2 * len(text) // 3 if document.apart else 0
    tokens = np.concatenate([first, text[:between], *others, text[between:]])
    return EncodedSample(
        key=name,
        tokens=tokens,
        targets=np.arange(len(tokens)) >= len(tokens) - 5,
        items={"encoder": tuple(images)} if images else {},
    )
