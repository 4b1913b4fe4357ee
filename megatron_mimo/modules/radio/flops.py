"""Operations of the vision encoder and of its projector."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_mimo.modules.flops import Flops, Work, all_pairs, attention, product
from megatron_mimo.modules.radio.config import RadioConfig, RadioModuleConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageWork(Work):
    """Amount of work of a vision encoder.

    Attributes:
        patches: Number of patches of all images.
        pieces: Number of images, or of tiles of them.
        piece_pairs: Number of pairs of tokens of one piece, class tokens included (`all_pairs`).
    """

    balanced = ("rows", "patches")

    patches: int = 0
    pieces: int = 0
    piece_pairs: int = 0


def image_work(lengths: Iterable[int], config: RadioConfig) -> ImageWork:
    """Work of the encoder, from the lengths of its pieces in tokens (`PackedImages.lengths`)."""
    lengths = tuple(lengths)
    patches = sum(lengths) - len(lengths) * config.class_token_len
    return ImageWork(
        rows=patches // (4 if config.pixel_shuffle else 1),
        patches=patches,
        pieces=len(lengths),
        piece_pairs=all_pairs(lengths),
    )


def vision_flops(config: RadioConfig, work: ImageWork, *, trains: bool = True) -> Flops:
    """Number of operations of the packed vision transformer."""
    width, tokens = config.hidden_size, work.patches + work.pieces * config.class_token_len
    # Pixels have no gradient.
    patches = product(work.patches, 3 * config.patch_dim**2, width, weight=trains, inputs=False)
    layer = product(tokens, width, 4 * width, weight=trains, inputs=trains)
    layer += product(tokens, width, 2 * config.ffn_hidden_size, weight=trains, inputs=trains)
    layer += attention(work.piece_pairs, width, backward=trains)
    return patches + layer * config.num_layers


def projector_flops(
    config: RadioModuleConfig,
    rows: int,
    row_width: int,
    *,
    trains: bool = True,
    vision_trains: bool = True,
) -> Flops:
    """Number of operations of the projector.

    Args:
        config: Architecture of both parts.
        rows: Number of rows.
        row_width: Width of the language model, H.
        trains: Whether the projector trains.
        vision_trains: Whether the vision encoder before it trains.
    """
    projector, size = config.projector, config.vision.row_size
    inner = projector.ffn_hidden_size
    # The norm in front has a weight to train.
    to_input = vision_trains or (trains and projector.normalization != "none")
    if projector.kind == "affine":
        return product(rows, size, row_width, weight=trains, inputs=to_input)
    first = product(rows, size, inner, weight=trains, inputs=to_input)
    return first + product(rows, inner, row_width, weight=trains, inputs=trains or vision_trains)
