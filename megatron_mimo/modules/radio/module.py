"""RADIO and its projector as one torch module that DDP can wrap."""

from collections.abc import Mapping

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_mimo.media.images import PackedImages
from megatron_mimo.modules.initial import transformer_initial
from megatron_mimo.modules.projector.projector import Projector
from megatron_mimo.modules.radio.config import RadioModuleConfig
from megatron_mimo.modules.radio.embedding import VideoEmbedding, gather_rows
from megatron_mimo.modules.radio.part import ImagesPart
from megatron_mimo.modules.radio.rows import all_rows
from megatron_mimo.modules.radio.vit import RadioVit
from megatron_mimo.modules.stage import ModuleStage
from megatron_mimo.weights.initial import Draw, Normal


class RadioModule(ModuleStage):
    """A stage of vision encoder and projector: from images to rows of the language model's width.

    The embedding of videos, where there is one, is on the first stage, the projector on the last.

    Args:
        architecture: Architecture of both parts.
        pg_collection: Groups of the module's grid.
        params_dtype: Dtype of the parameters and activations.
        row_width: Width of the language model, H.
        frozen: Names of the parts that do not train: "vision", "projector", "video".
        initialize: Whether to draw the vision encoder's initial weights.
    """

    def __init__(
        self,
        architecture: RadioModuleConfig,
        pg_collection: ProcessGroupCollection,
        params_dtype: torch.dtype,
        *,
        row_width: int,
        frozen: frozenset[str] = frozenset(),
        initialize: bool = True,
    ) -> None:
        vision = RadioVit(architecture.vision, pg_collection, params_dtype, initialize=initialize)
        super().__init__(config=vision.config)
        self.architecture = architecture
        self.vision = vision
        self.cp_group = pg_collection.cp
        self.projector = (
            Projector(
                architecture.projector,
                architecture.vision.row_size,
                row_width,
                pg_collection,
                params_dtype,
            )
            if vision.is_last
            else None
        )
        self.video = (
            VideoEmbedding(architecture.video, architecture.vision, params_dtype)
            if architecture.video is not None and vision.is_first
            else None
        )
        if self.video is not None:
            self.video.requires_grad_("video" not in frozen)
        if "vision" in frozen:
            trains = architecture.video is not None and "video" not in frozen
            self.vision.freeze(passes_gradients=trains)
        if self.projector is not None:
            self.projector.requires_grad_("projector" not in frozen)

    @property
    def parts(self) -> Mapping[str, nn.Module | None]:
        """The vision encoder, the embedding of videos (first stage), the projector (last stage)."""
        parts = {"vision": self.vision, "projector": self.projector}
        return parts if self.architecture.video is None else parts | {"video": self.video}

    def initial(self, name: str) -> Draw | None:
        """Distribution of an initial weight; norms and the projector's biases stay as built."""
        if name.startswith("projector."):
            std = self.architecture.projector.init_method_std
            return None if name.endswith(".bias") or ".norm." in name else Normal(std)
        vision, video = self.architecture.vision, self.architecture.video
        if video is not None and name.startswith("video."):
            return Normal(video.init_method_std)
        if name == "vision.embedding.position":
            return Normal(vision.position_init_std)
        return transformer_initial(name, vision.init_method_std, vision.num_layers)

    def forward(self, images: PackedImages, hidden: Tensor | None = None) -> Tensor:
        """Encode packed images and videos.

        Args:
            images: Packed images and videos on this rank's device; with context parallelism this
                rank's part of them, whose L tokens it computes.
            hidden: Hidden states of the previous stage [L, H]; None on the first stage.

        Returns:
            Rows [R, H_llm] of all items, or hidden states [L, H] before the last stage, in the
            dtype of parameters.
        """
        groups = None if self.video is None else self.video(images)
        tokens: Tensor = self.vision(images, hidden, groups)
        if self.projector is None:
            return tokens
        row_size = self.architecture.vision.row_size
        rows: Tensor = self.projector(gather_rows(tokens, images.row_index, row_size))
        return all_rows(rows, images, self.cp_group) if isinstance(images, ImagesPart) else rows
