"""Adapter of RADIO with a projector."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from megatron_mimo.media.images import ImageInput
from megatron_mimo.media.images.input import ImageTagType
from megatron_mimo.modules.adapter import BuildContext, Division, FlopsContext, SourceAdapter
from megatron_mimo.modules.flops import Flops
from megatron_mimo.modules.radio.config import RadioModuleConfig
from megatron_mimo.modules.radio.flops import (
    PROJECTOR,
    VISION,
    ImageWork,
    image_work,
    projector_flops,
    vision_flops,
)

if TYPE_CHECKING:
    from megatron_mimo.media.images import PackedImages
    from megatron_mimo.modules.stage import ModuleStage

# As in a flat checkpoint of a Nemotron vision-language model.
STORED_PREFIXES: Mapping[str, str] = {
    "vision.": "vision_model.",
    "projector.": "vision_projection.",
}


class RadioAdapter(SourceAdapter[RadioModuleConfig, ImageWork]):
    """RADIO over packed images, and a projector on its last stage."""

    config_type = RadioModuleConfig
    work_type = ImageWork

    def part_titles(self, config: RadioModuleConfig) -> Mapping[str, str]:
        """Titles of the parts in tables."""
        return {VISION: "vision encoder", PROJECTOR: "projector"}

    def trains_inside(self, config: RadioModuleConfig, frozen: frozenset[str]) -> bool:
        """Whether the vision encoder trains; the projector is on the last stage."""
        return VISION not in frozen

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
        return STORED_PREFIXES

    def divisions(self, config: RadioModuleConfig) -> Iterable[Division]:
        """Layers divide over stages; heads and MLPs over tensor-parallel ranks."""
        return (
            Division("pp", VISION, "num_layers"),
            Division("tp", VISION, "num_attention_heads"),
            Division("tp", VISION, "ffn_hidden_size"),
            Division("tp", PROJECTOR, "ffn_hidden_size"),
        )

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
        return vision_flops(config.vision, work, context) + projector_flops(
            config, work.rows, context.row_width, context
        )

    def work(self, config: RadioModuleConfig, packed: "PackedImages") -> ImageWork:
        """Work of packed images."""
        return image_work(packed.lengths, config.vision)

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
        **settings: Any,
    ) -> ImageInput:
        """Conversion of images to patches, tokens and rows; a frozen encoder sees no crops.

        Args:
            config: Architecture of the module.
            name: Name of the module.
            frozen: Names of the parts that do not train.
            placeholder: Placeholder of an image in texts, and the token that its rows replace.
            tag_type: Kind of the tags around an image; None for no tags.
            mock_rows: Number of rows of every mock image; None for images of any size.
            noun: Name of one image, and of its field in stored samples.
            settings: Fields of `ImageConfig` that the architecture leaves open.
        """
        crops = config.vision.position_crop and VISION not in frozen
        return ImageInput(
            config=config.vision.image_config(position_crop=crops, **settings),
            placeholder=placeholder,
            tag_type=tag_type,
            mock_rows=mock_rows,
            noun=noun,
        )
