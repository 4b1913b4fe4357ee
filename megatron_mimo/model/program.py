"""One step of the model over its microbatches, as the executor calls it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mimo.data.batch import Microbatch
from megatron_mimo.model.merge import row_positions
from megatron_mimo.model.mimo import MimoModel


class MimoStep:
    """Implements `schedule.executor.StepProgram`.

    Attributes:
        loss_sum: float64 scalar, summed cross entropy of this rank's target tokens so far.
    """

    def __init__(
        self, model: MimoModel, microbatches: Sequence[Microbatch], image_token_id: int
    ) -> None:
        self._model = model
        self._microbatches = microbatches
        self._image_token_id = image_token_id
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)

    def encode(self, microbatch: int) -> Tensor:
        """Rows [R, H] of the images that this rank runs."""
        encoder, images = self._model.encoder, self._microbatches[microbatch].images
        assert encoder is not None and images is not None
        device = self._model.device
        return encoder(
            images.patches.to(device),
            images.positions.to(device),
            images.cu_seqlens.to(device),
            images.max_seqlen,
            images.row_index.to(device),
        )

    def forward(self, microbatch: int, rows: Tensor | None) -> Tensor:
        """Summed cross entropy of the lane's target tokens, float32."""
        language, text = self._model.language, self._microbatches[microbatch].text
        assert language is not None and text is not None
        device = self._model.device
        losses = language(
            text.input_ids.to(device),
            text.position_ids.to(device),
            rows,
            row_positions(text.input_ids, self._image_token_id).to(device),
            text.labels.to(device),
        )
        loss = (losses.float() * text.loss_mask.to(device)).sum()
        self.loss_sum += loss.detach()
        return loss
