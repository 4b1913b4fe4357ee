"""Parakeet and its projector as one torch module that DDP can wrap."""

from collections.abc import Mapping

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_mimo.media.audio.packing import PackedClips
from megatron_mimo.modules.parakeet.config import ParakeetModuleConfig
from megatron_mimo.modules.parakeet.encoder import ParakeetEncoder
from megatron_mimo.modules.parakeet.flops import AUDIO, PROJECTOR
from megatron_mimo.modules.projector.projector import Projector
from megatron_mimo.modules.stage import ModuleStage
from megatron_mimo.weights.initial import Draw, Normal


class ParakeetModule(ModuleStage):
    """A stage of audio encoder and projector: from clips to rows of the language model's width.

    The projector is on the last stage.

    Args:
        architecture: Architecture of both parts.
        pg_collection: Groups of the module's grid.
        params_dtype: Dtype of the parameters and activations.
        row_width: Width of the language model, H.
        frozen: Names of the parts that do not train: "audio", "audio_projector".
        initialize: Whether to draw the audio encoder's initial weights.
    """

    def __init__(
        self,
        architecture: ParakeetModuleConfig,
        pg_collection: ProcessGroupCollection,
        params_dtype: torch.dtype,
        *,
        row_width: int,
        frozen: frozenset[str] = frozenset(),
        initialize: bool = True,
    ) -> None:
        audio = ParakeetEncoder(
            architecture.audio, pg_collection, params_dtype, initialize=initialize
        )
        super().__init__(config=audio.config)
        self.architecture = architecture
        self.audio = audio
        self.audio_projector = (
            Projector(
                architecture.audio_projector,
                architecture.audio.hidden_size,
                row_width,
                pg_collection,
                params_dtype,
            )
            if audio.is_last
            else None
        )
        if AUDIO in frozen:
            self.audio.freeze()
        if self.audio_projector is not None:
            self.audio_projector.requires_grad_(PROJECTOR not in frozen)

    @property
    def parts(self) -> Mapping[str, nn.Module | None]:
        """The audio encoder, and on the last stage the projector."""
        return {AUDIO: self.audio, PROJECTOR: self.audio_projector}

    def initial(self, name: str) -> Draw | None:
        """Distribution of an initial weight; norms and biases of layers stay as built."""
        if name.endswith(".bias") or "norm" in name:
            return None
        if name.startswith(f"{PROJECTOR}."):
            return Normal(self.architecture.audio_projector.init_method_std)
        audio = self.architecture.audio
        convolves = ("subsampling." in name and "linear" not in name) or "depthwise" in name
        return Normal(audio.convolution_init_std if convolves else audio.init_method_std)

    def idle(self, *, backward: bool) -> None:
        """Take part in the statistics of the other ranks' clips, where those are asked for."""
        self.audio.idle(backward=backward)

    def forward(self, clips: PackedClips, hidden: Tensor | None = None) -> Tensor:
        """Encode packed clips.

        Args:
            clips: Packed clips on this rank's device.
            hidden: Hidden states of the previous stage [R, H]; None on the first stage.

        Returns:
            Rows [R, H_llm] in the order of clips, or hidden states [R, H] before the last stage, in
            the dtype of parameters.
        """
        rows: Tensor = self.audio(clips, hidden)
        if self.audio_projector is None:
            return rows
        projected: Tensor = self.audio_projector(rows.index_select(0, clips.row_index))
        return projected
