"""Adapter of RADIO with a projector."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_mimo.media.images import ImageInput
from megatron_mimo.media.images.input import ImageTagType, tags_of
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.media.video.input import VideoInput
from megatron_mimo.modules.adapter import (
    Axis,
    BuildContext,
    Division,
    FlopsContext,
    SourceAdapter,
)
from megatron_mimo.modules.flops import Flops
from megatron_mimo.modules.projector.flops import projector_flops
from megatron_mimo.modules.radio.config import RadioModuleConfig
from megatron_mimo.modules.radio.flops import (
    PROJECTOR,
    VIDEO,
    VISION,
    ImageWork,
    image_work,
    vision_flops,
)

if TYPE_CHECKING:
    from megatron_mimo.media.images import PackedImages
    from megatron_mimo.modules.stage import ModuleStage

# As in a flat checkpoint of a Nemotron vision-language model.
STORED_PREFIXES: Mapping[str, str] = {
    "vision.": "vision_model.",
    "projector.": "vision_projection.",
    "video.": "video_projection.",
}


class RadioAdapter(SourceAdapter[RadioModuleConfig, ImageWork]):
    """RADIO over packed images, and a projector on its last stage."""

    config_type = RadioModuleConfig
    work_type = ImageWork

    def parts(self, config: RadioModuleConfig) -> Mapping[str, Any]:
        """The parts that the module has: all have a vision encoder and a projector."""
        found: dict[str, Any] = {VISION: config.vision, PROJECTOR: config.projector}
        return found if config.video is None else found | {VIDEO: config.video}

    def part_titles(self, config: RadioModuleConfig) -> Mapping[str, str]:
        """Titles of the parts in tables."""
        titles = {VISION: "vision encoder", PROJECTOR: "projector", VIDEO: "video embedding"}
        return {name: titles[name] for name in self.parts(config)}

    def trains_inside(self, config: RadioModuleConfig, frozen: frozenset[str]) -> bool:
        """Whether anything before the projector trains, which is on the last stage."""
        return any(name not in frozen for name in self.parts(config) if name != PROJECTOR)

    def build(self, config: RadioModuleConfig, context: BuildContext) -> "ModuleStage":
        """This rank's shard of its pipeline stage."""
        from megatron_mimo.modules.radio.module import RadioModule

        return RadioModule(
            config,
            context.pg_collection,
            context.params_dtype,
            row_width=context.row_width,
            frozen=context.frozen,
            initialize=context.initialize,
        )

    def hidden_width(self, config: RadioModuleConfig) -> int:
        """Width of a token of the vision encoder."""
        return config.vision.hidden_size

    def prefixes(self, config: RadioModuleConfig, name: str) -> Mapping[str, str]:
        """Prefixes of a Megatron checkpoint."""
        if config.video is not None:
            return STORED_PREFIXES
        return {own: stored for own, stored in STORED_PREFIXES.items() if own != f"{VIDEO}."}

    def divisions(self, config: RadioModuleConfig) -> Iterable[Division]:
        """Layers divide over stages; heads and MLPs over tensor-parallel ranks."""
        return (
            Division("pp", VISION, "num_layers"),
            Division("tp", VISION, "num_attention_heads"),
            Division("tp", VISION, "ffn_hidden_size"),
            Division("tp", PROJECTOR, "ffn_hidden_size"),
        )

    def parallel_axes(self, config: RadioModuleConfig) -> frozenset[Axis]:
        """The axis cp: its ranks share the tokens of large images and videos."""
        return frozenset({"cp"})

    def part(
        self, config: RadioModuleConfig, packed: "PackedImages", *, rank: int, ranks: int
    ) -> "PackedImages":
        """The tokens of packed images and videos that a context-parallel rank computes."""
        from megatron_mimo.modules.radio.part import part_of

        merged = config.vision.row_size // config.vision.hidden_size
        return part_of(packed, rank=rank, ranks=ranks, merged=merged)

    def linear_layers(
        self, config: RadioModuleConfig, row_width: int
    ) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """The linear layers of the transformer, and of the projector."""
        vision, projector = config.vision, config.projector
        width, inner = vision.hidden_size, vision.ffn_hidden_size
        return {
            VISION: {
                "linear_qkv": (width, 3 * width),
                "linear_proj": (width, width),
                "linear_fc1": (width, inner),
                "linear_fc2": (inner, width),
            },
            PROJECTOR: {"linear": (vision.row_size, row_width)}
            if projector.kind == "affine"
            else {
                "linear_fc1": (vision.row_size, projector.ffn_hidden_size),
                "linear_fc2": (projector.ffn_hidden_size, row_width),
            },
        }

    def flops(self, config: RadioModuleConfig, work: ImageWork, context: FlopsContext) -> Flops:
        """Number of operations of some work of both parts."""
        return vision_flops(config, work, context) + projector_flops(
            config.projector,
            context,
            part=PROJECTOR,
            size=config.vision.row_size,
            rows=work.rows,
            below=self.trains_inside(config, context.frozen),
        )

    def work(self, config: RadioModuleConfig, packed: "PackedImages") -> ImageWork:
        """Work of packed images."""
        videos = 0 if packed.groups is None else len(packed.groups)
        return image_work(packed.lengths, config.vision, video_patches=videos)

    def item_work(self, config: RadioModuleConfig, lengths: Sequence[int], rows: int) -> ImageWork:
        """Work of one image or video; the patches of a video count as those of images."""
        return image_work(lengths, config.vision)

    def takes(self, config: RadioModuleConfig) -> str:
        """Images, also where there are videos beside them, or videos alone."""
        return "image" if config.images else "video"

    def without_videos(
        self, config: RadioModuleConfig
    ) -> tuple[RadioModuleConfig, RadioModuleConfig] | None:
        """A module for images and one for videos, of the same sizes."""
        if config.video is None or not config.images:
            return None
        return replace(config, video=None), replace(config, images=False)

    def item_input(
        self,
        config: RadioModuleConfig,
        *,
        name: str,
        frozen: frozenset[str],
        placeholder: str = "<image>",
        tag_type: ImageTagType | None = None,
        mock_rows: int | None = None,
        noun: str = "image",
        videos: VideoConfig | None = None,
        audio: Any = None,
        several: bool = False,
        **settings: Any,
    ) -> ImageInput | VideoInput:
        """Conversion of images to patches, tokens and rows; a frozen encoder sees no crops.

        Args:
            config: Architecture of the module.
            name: Name of the module.
            frozen: Names of the parts that do not train.
            placeholder: Placeholder of an image in texts, and the token that its rows replace.
            tag_type: Kind of the tags around an image; None for no tags.
            mock_rows: Number of rows of every mock image; None for images of any size.
            noun: Name of one image, and of its field in stored samples.
            videos: How a video becomes frames, for a module that takes videos alone.
            audio: Not used.
            several: Whether the model has another module of this family.
            settings: Fields of `ImageConfig` that the architecture leaves open.
        """
        crops = config.vision.position_crop and VISION not in frozen
        images = config.vision.image_config(position_crop=crops, **settings)
        if not config.images:
            kind = name if several else "video"
            return VideoInput(
                config=_videos(config, videos),
                placeholder=f"<{kind}>",
                tags=tags_of(tag_type),
                feeds=None,
                images=images,
                noun=kind,
                class_tokens=config.vision.class_token_len,
            )
        return ImageInput(
            config=images,
            placeholder=placeholder,
            tag_type=tag_type,
            mock_rows=mock_rows,
            noun=noun,
        )

    def guest_inputs(
        self,
        config: RadioModuleConfig,
        *,
        name: str,
        frozen: frozenset[str],
        tag_type: ImageTagType | None = None,
        noun: str = "image",
        videos: VideoConfig | None = None,
        **settings: Any,
    ) -> Mapping[str, VideoInput]:
        """Videos, where the module embeds them; each group of frames is written like an image.

        Args:
            config: Architecture of the module.
            name: Name of the module.
            frozen: Names of the parts that do not train.
            tag_type: Kind of the tags around an image; None for no tags.
            noun: Name of one image.
            videos: How a video becomes frames; None for all of its frames.
            settings: Fields of images, which are not used.
        """
        if config.video is None or not config.images:
            return {}
        kind = "video" if noun == "image" else f"{name}-video"
        return {
            kind: VideoInput(
                config=_videos(config, videos),
                placeholder=f"<{kind}>",
                tags=tags_of(tag_type),
                feeds=name,
                noun=kind,
                class_tokens=config.vision.class_token_len,
            )
        }


def _videos(config: RadioModuleConfig, videos: VideoConfig | None) -> VideoConfig:
    """How a video becomes frames and patches of a module."""
    assert config.video is not None
    vision = config.vision
    return replace(
        videos or VideoConfig(),
        temporal_patch=config.video.frames,
        patch_dim=vision.patch_dim,
        merge=2 if vision.pixel_shuffle else 1,
        pixel_mean=vision.pixel_mean,
        pixel_std=vision.pixel_std,
    )
