"""Operations of the vision encoder and of its projector."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_mimo.modules.adapter import FlopsContext
from megatron_mimo.modules.flops import Flops, LoraLayers, Work, all_pairs, attention
from megatron_mimo.modules.radio.config import RadioConfig, RadioModuleConfig

VISION, PROJECTOR, VIDEO = "vision", "projector", "video"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageWork(Work):
    """Amount of work of a vision encoder.

    Attributes:
        patches: Number of patches of all images, and of all groups of a video's frames.
        video_patches: Number of those of videos.
        pieces: Number of images, of tiles of them, and of groups of frames.
        piece_pairs: Number of pairs of tokens of one piece, class tokens included (`all_pairs`).
    """

    balanced = ("rows", "patches")

    patches: int = 0
    video_patches: int = 0
    pieces: int = 0
    piece_pairs: int = 0


def image_work(lengths: Iterable[int], config: RadioConfig, *, video_patches: int = 0) -> ImageWork:
    """Work of the encoder.

    Args:
        lengths: Numbers of tokens of its pieces (`PackedImages.lengths`).
        config: Architecture of the encoder.
        video_patches: Number of patches of videos.
    """
    lengths = tuple(lengths)
    patches = sum(lengths) - len(lengths) * config.class_token_len
    return ImageWork(
        rows=patches // (4 if config.pixel_shuffle else 1),
        patches=patches,
        video_patches=video_patches,
        pieces=len(lengths),
        piece_pairs=all_pairs(lengths),
    )


def vision_flops(module: RadioModuleConfig, work: ImageWork, context: FlopsContext) -> Flops:
    """Number of operations of the packed vision transformer, and of the embedding of videos."""
    config = module.vision
    width, inner = config.hidden_size, config.ffn_hidden_size
    tokens = work.patches + work.pieces * config.class_token_len
    # Gradients pass through a frozen encoder to an embedding that trains.
    trains = context.trains(VISION) or (module.video is not None and context.trains(VIDEO))
    # Pixels have no gradient.
    pixels = 3 * config.patch_dim**2
    patches = context.linear(VISION, backward=False)(
        "", work.patches - work.video_patches, pixels, width
    )
    if module.video is not None:
        patches += context.linear(VIDEO, backward=False)(
            "", work.video_patches, module.video.frames * pixels, width
        )

    def layer(first: bool) -> Flops:
        # Where no weight trains, gradients end at the first adapter.
        below = trains and not (first and VISION in context.lora)
        adapted = context.lora.get(VISION, LoraLayers(rank=1, layers=frozenset())).layers
        flops = Flops()
        for name, inputs, outputs, parts in (
            ("linear_qkv", width, 3 * width, 3),
            ("linear_proj", width, width, 1),
            ("linear_fc1", width, inner, 1),
            ("linear_fc2", inner, width, 1),
        ):
            linear = context.linear(VISION, backward=below)
            flops += linear(name, tokens, inputs, outputs, parts=parts)
            below = below or name in adapted
            if name == "linear_qkv":
                flops += attention(work.piece_pairs, width, backward=below)
        return flops

    return patches + layer(True) + layer(False) * (config.num_layers - 1)
