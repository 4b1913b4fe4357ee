"""One step of the model over its microbatches, as the executor calls it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mimo.data.batch import Microbatch, TextBatch
from megatron_mimo.model.merge import positions_in, row_positions
from megatron_mimo.model.mimo import MimoModel
from megatron_mimo.runtime.packed import PackedSegments, packed_documents
from megatron_mimo.schedule.actions import Module


class MimoStep:
    """Implements `schedule.executor.StepProgram`.

    Attributes:
        loss_sum: float64 scalar, summed cross entropy of this rank's target tokens so far; 0 before
            the language model's last stage.
    """

    def __init__(
        self,
        model: MimoModel,
        microbatches: Sequence[Microbatch],
        image_token_id: int,
        loss_scale: float = 1.0,
    ) -> None:
        self._loss_scale = loss_scale
        self._model = model
        self._microbatches = microbatches
        self._image_token_id = image_token_id
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)
        if model.language is not None:
            sharding, place = model.sharding, model.language.groups.place
            shard = sharding.shard(cp_rank=place.cp, tp_rank=place.tp)
            # Positions that this cp rank reads, and those that this rank embeds; on the host.
            self._read = positions_in(sharding.cp_intervals(place.cp))
            self._embedded = positions_in(sharding.intervals(shard))

    def encode(self, microbatch: int, hidden: Tensor | None) -> Tensor:
        """Rows [R, H] of the images that this rank runs, or hidden states [L, H_vit]."""
        encoder, images = self._model.encoder, self._microbatches[microbatch].images
        assert encoder is not None and images is not None
        return encoder(images.to(self._model.device), hidden)

    def forward(self, microbatch: int, inputs: Tensor | None) -> Tensor:
        """Scaled sum of the lane's cross entropies, float32, or hidden states [s*B, H]."""
        language, text = self._model.language, self._microbatches[microbatch].text
        assert language is not None and text is not None
        groups = language.groups
        input_ids = position_ids = positions = labels = None
        if groups.is_first_stage:
            input_ids, position_ids = self._part(text.input_ids), self._part(text.position_ids)
            positions = self._row_positions(text.input_ids)
        else:
            assert inputs is not None
            batch = text.input_ids.shape[0]
            inputs = inputs.view(self._model.sharding.shard_length, batch, -1)
        if groups.is_last_stage:
            labels = self._part(text.labels)
        documents = self._documents(text)
        output = language(input_ids, position_ids, inputs, positions, labels, documents)
        if not groups.is_last_stage:
            return output.flatten(0, 1)
        loss = (output.float() * self._part(text.loss_mask)).sum()
        self.loss_sum += loss.detach()
        return loss * self._loss_scale

    def begin_last_backward(self, module: Module) -> None:
        """What a module exchanges while its last backward runs, it exchanges from here on."""
        encoder = module is Module.ENCODER
        replica = self._model.encoder if encoder else self._model.language
        assert replica is not None
        replica.begin_last_backward()

    def hidden_rows(self, module: Module, microbatch: int) -> int:
        """N of the hidden states [N, width] that the stages of a module hand on."""
        drawn = self._microbatches[microbatch]
        if module is Module.ENCODER:
            assert drawn.images is not None
            return drawn.images.num_tokens
        assert drawn.text is not None
        return drawn.text.input_ids.shape[0] * self._model.sharding.shard_length

    def _part(self, tokens: Tensor) -> Tensor:
        """This cp rank's part of [B, S], on the device."""
        return tokens[:, self._read].to(self._model.device)

    def _documents(self, text: TextBatch) -> PackedSegments | None:
        """Bounds of a packed sequence's documents; on the device, where thd kernels read them.

        Transformer Engine's take int32 [N+1], 0 to S without gaps, and the longest length as a
        number of the host: a tensor left on the host, or a length asked of the device, would make
        every layer wait. The padding is a segment too, so that no position lies outside of all.
        """
        if text.lengths is None:
            return None
        assert text.cu_seqlens is not None and text.input_ids.shape[0] == 1
        bounds = text.cu_seqlens.to(self._model.device, non_blocking=True)
        return packed_documents(bounds, text.lengths)

    def _row_positions(self, input_ids: Tensor) -> Tensor:
        """Where this rank's rows go, from [B, S] on the host; on the device."""
        positions = row_positions(input_ids, self._image_token_id, self._embedded)
        return positions.to(self._model.device)
