"""What differs between the processors of transformers: a record for each family of models.

What an image becomes is computed twice: by the processor, from its pixels, and here, from its size
alone, for the readers that need no pixels. Sizes go through the functions that the processor itself
calls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from megatron_mimo.media.processors.packed import Argument, Outline

Settings = Mapping[str, Any]
Content = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemTexts:
    """How an image is written; each text is one token of the vocabulary, or empty.

    Attributes:
        token: Token that rows replace.
        before: Text before the rows, which the processor writes.
        between: Text between lines of rows.
        after: Text after the rows.
        opens: Text in front of the image, which the chat template writes.
        closes: Text behind the image, which the chat template writes.
    """

    token: str
    before: str = ""
    between: str = ""
    after: str = ""
    opens: str = ""
    closes: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorFamily:
    """What the processors of a family of models have in common.

    Attributes:
        processor: Name of the class in transformers.
        image_processor: Name of the class of its image processor.
        texts: Function from a processor to how it writes an image.
        settings: Function from a processor to what it tells its image processor beside the
            processor's own settings.
        outline: Function from a processor, its image settings, the height and the width of an image
            in pixels, and whether its sample has several, to what the image becomes. Raises
            ValueError for sizes that the processor refuses.
        arguments: Arguments of the model's `get_image_features`.
        pictures: Function from these arguments for one image, and the image settings, to what the
            tower sees: normalised pixels, each [3, H, W]; several of an image in tiles.
        same: Paths of numbers in a processor and in the model's configuration, which must agree.
        separates: Whether an image is another one where its sample has several.
        numbers: Function from the numbers of images of samples with one image and of others to
            further arguments of `get_image_features`.
    """

    processor: str
    image_processor: str
    texts: Callable[[Any], ItemTexts]
    outline: Callable[[Any, Settings, int, int, bool], Outline]
    arguments: tuple[Argument, ...]
    pictures: Callable[[Content, Settings], Sequence[NDArray[Any]]]
    same: tuple[tuple[str, str], ...]
    settings: Callable[[Any], Settings] = lambda processor: {}
    separates: bool = False
    numbers: Callable[[int, int], Mapping[str, Tensor]] = lambda alone, together: {}


# -- Gemma 4 ---------------------------------------------------------------------------------------


def _gemma4(processor: Any, settings: Settings, height: int, width: int, _: bool) -> Outline:
    from transformers.models.gemma4.processing_gemma4 import get_aspect_ratio_preserving_size

    patch, pool, most = (
        settings[name] for name in ("patch_size", "pooling_kernel_size", "max_soft_tokens")
    )
    sides: Sequence[int] = get_aspect_ratio_preserving_size(
        height=height,
        width=width,
        patch_size=patch,
        max_patches=most * pool**2,
        pooling_kernel_size=pool,
    )
    patches = sides[0] // patch * (sides[1] // patch)
    return Outline(size=(width, height), num_tokens=patches, lines=(patches // pool**2,), facts={})


def _gemma4_pictures(content: Content, settings: Settings) -> Sequence[NDArray[Any]]:
    columns = content["image_position_ids"][:, 0].max() + 1
    side = settings["patch_size"]
    pattern = "(row column) (y x c) -> c (row y) (column x)"
    return [rearrange(content["pixel_values"], pattern, column=columns, y=side, x=side)]


_GEMMA4 = ProcessorFamily(
    processor="Gemma4Processor",
    image_processor="Gemma4ImageProcessor",
    texts=lambda processor: ItemTexts(
        token=processor.image_token, before=processor.boi_token, after=processor.eoi_token
    ),
    outline=_gemma4,
    arguments=(
        Argument(name="pixel_values", join="pad", is_filled=True),
        Argument(name="image_position_ids", join="pad", filling=-1, is_filled=True),
    ),
    pictures=_gemma4_pictures,
    same=(
        ("image_processor.patch_size", "vision_config.patch_size"),
        ("image_processor.pooling_kernel_size", "vision_config.pooling_kernel_size"),
    ),
)

# -- Qwen3-VL, Qwen3.5 -----------------------------------------------------------------------------


def _qwen(processor: Any, settings: Settings, height: int, width: int, _: bool) -> Outline:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    patch, merge, size = (settings[name] for name in ("patch_size", "merge_size", "size"))
    sides = smart_resize(
        height,
        width,
        factor=patch * merge,
        min_pixels=size["shortest_edge"],
        max_pixels=size["longest_edge"],
    )
    rows, columns = (side // patch for side in sides)
    return Outline(
        size=(width, height),
        num_tokens=rows * columns,
        lines=(rows * columns // merge**2,),
        facts={"image_grid_thw": (1, rows, columns)},
    )


def _qwen_pictures(content: Content, settings: Settings) -> Sequence[NDArray[Any]]:
    side, merge = settings["patch_size"], settings["merge_size"]
    frames = rearrange(
        content["pixel_values"],
        "(row column down across) (c t y x) -> t c (row down y) (column across x)",
        column=content["image_grid_thw"][2] // merge,
        down=merge,
        across=merge,
        t=settings["temporal_patch_size"],
        y=side,
        x=side,
    )
    # An image is a film that stands still.
    return [frames[0]]


_QWEN = ProcessorFamily(
    processor="Qwen3VLProcessor",
    image_processor="Qwen2VLImageProcessor",
    texts=lambda processor: ItemTexts(
        token=processor.image_token,
        opens=processor.vision_start_token,
        closes=processor.vision_end_token,
    ),
    outline=_qwen,
    arguments=(
        Argument(name="pixel_values", join="follow"),
        Argument(name="image_grid_thw", join="stack"),
    ),
    pictures=_qwen_pictures,
    same=(
        ("image_processor.patch_size", "vision_config.patch_size"),
        ("image_processor.temporal_patch_size", "vision_config.temporal_patch_size"),
        ("image_processor.merge_size", "vision_config.spatial_merge_size"),
    ),
)

# -- Mistral 3 -------------------------------------------------------------------------------------


def _mistral3_unit(processor: Any) -> int:
    """Side in pixels of the patches of a row."""
    unit: int = processor.patch_size * processor.spatial_merge_size
    return unit


def _mistral3(processor: Any, settings: Settings, height: int, width: int, _: bool) -> Outline:
    from transformers.image_utils import ChannelDimension
    from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size

    size, unit = settings["size"], _mistral3_unit(processor)
    edge = size.get("longest_edge")
    sides = get_resize_output_image_size(
        # The function asks an image for its sides; this one takes no memory.
        np.broadcast_to(np.uint8(0), (3, height, width)),
        size=(edge, edge) if edge else (size["height"], size["width"]),
        patch_size=unit,
        input_data_format=ChannelDimension.FIRST,
    )
    rows, columns = (side // unit for side in sides)
    return Outline(
        size=(width, height),
        num_tokens=rows * columns * processor.spatial_merge_size**2,
        lines=(columns,) * rows,
        facts={},
    )


_MISTRAL3 = ProcessorFamily(
    processor="PixtralProcessor",
    image_processor="PixtralImageProcessor",
    texts=lambda processor: ItemTexts(
        token=processor.image_token,
        between=processor.image_break_token,
        after=processor.image_end_token,
    ),
    # A number would do, with a warning for each image.
    settings=lambda processor: {
        "patch_size": dict.fromkeys(("height", "width"), _mistral3_unit(processor))
    },
    outline=_mistral3,
    arguments=(
        Argument(name="pixel_values", join="pad"),
        Argument(name="image_sizes", join="stack"),
    ),
    pictures=lambda content, settings: [content["pixel_values"]],
    same=(
        ("patch_size", "vision_config.patch_size"),
        ("spatial_merge_size", "spatial_merge_size"),
    ),
)

# -- LLaVA-OneVision -------------------------------------------------------------------------------


def _llava(processor: Any, settings: Settings, height: int, width: int, several: bool) -> Outline:
    from transformers.image_processing_utils import select_best_resolution

    size = settings["size"]
    tile = size.get("height") or size["shortest_edge"]
    tokens: int = processor.num_image_tokens
    if several:
        # The whole image on one tile, and the token that ends its only line.
        tiles, rows = 1, tokens + 1
    else:
        best = select_best_resolution((height, width), settings["image_grid_pinpoints"])
        tiles = 1 + best[0] // tile * (best[1] // tile)
        rows = processor._get_number_of_features(height, width, tile, tile)
    if processor.vision_feature_select_strategy == "default":
        rows -= 1
    return Outline(size=(width, height), num_tokens=tiles * tokens, lines=(rows,), facts={})


def _llava_numbers(alone: int, together: int) -> Mapping[str, Tensor]:
    # The tower tiles images of samples that have one. It reads further than the images it is given
    # without harm, so the only image of a sample with several can be said to be one of two.
    counts = [1] * alone + ([max(2, together)] if together else [])
    return {"batch_num_images": torch.tensor(counts)}


_LLAVA = ProcessorFamily(
    processor="LlavaOnevisionProcessor",
    image_processor="LlavaOnevisionImageProcessor",
    texts=lambda processor: ItemTexts(token=processor.image_token),
    outline=_llava,
    arguments=(
        Argument(name="pixel_values", join="pad"),
        Argument(name="image_sizes", join="stack"),
    ),
    pictures=lambda content, settings: list(content["pixel_values"]),
    same=(
        ("image_processor.size.height", "vision_config.image_size"),
        ("image_processor.image_grid_pinpoints", "image_grid_pinpoints"),
        ("vision_feature_select_strategy", "vision_feature_select_strategy"),
        ("vision_aspect_ratio", "vision_aspect_ratio"),
    ),
    separates=True,
    numbers=_llava_numbers,
)

FAMILIES: Mapping[str, ProcessorFamily] = {
    "gemma4": _GEMMA4,
    "llava_onevision": _LLAVA,
    "mistral3": _MISTRAL3,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
}
"""Families by the `model_type` of their folders."""
