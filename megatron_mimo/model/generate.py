"""Greedy answers from the model as it stands on its grids."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_mimo.data.batch import Microbatch, TextBatch
from megatron_mimo.model.merge import row_positions
from megatron_mimo.model.mimo import MimoModel
from megatron_mimo.model.program import MimoStep


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One sample's answer.

    Attributes:
        key: Sample key.
        expected: Target tokens, end of sequence included.
        generated: Tokens that the model wrote, up to the end of sequence or the limit.
    """

    key: str
    expected: tuple[int, ...]
    generated: tuple[int, ...]


class GreedyStep(MimoStep):
    """A step program whose forward writes answers token by token instead of scoring them.

    The answer is blanked out of the input first: the model sees the prompt and its own tokens only.
    The whole sequence runs again for each token, which suits evaluation of short answers.

    Attributes:
        answers: Of this rank's lane, in sample order.
    """

    def __init__(
        self,
        model: MimoModel,
        microbatches: Sequence[Microbatch],
        image_token_id: int,
        *,
        pad_id: int,
        eos_id: int,
        max_new_tokens: int,
    ) -> None:
        super().__init__(model, microbatches, image_token_id)
        self._pad_id = pad_id
        self._eos_id = eos_id
        self._max_new_tokens = max_new_tokens
        self.answers: list[Answer] = []

    @torch.no_grad()
    def forward(self, microbatch: int, rows: Tensor | None) -> Tensor:
        """Append this microbatch's answers; returns a zero."""
        text = self._microbatches[microbatch].text
        assert text is not None
        written = self._decode(text, rows)
        for i, key in enumerate(text.sample_keys):
            targets = text.labels[i][text.loss_mask[i] > 0]
            self.answers.append(
                Answer(
                    key=key,
                    expected=tuple(targets.tolist()),
                    generated=self._until_eos(written[i].tolist()),
                )
            )
        return self.loss_sum

    def _decode(self, text: TextBatch, rows: Tensor | None) -> Tensor:
        """Tokens written after each prompt, int64 [B, N]."""
        language, device = self._model.language, self._model.device
        assert language is not None
        # The first target position holds the last token of the prompt.
        last = text.loss_mask.gt(0).int().argmax(dim=1)
        sequence = torch.arange(text.input_ids.shape[1])
        prompt = text.input_ids.where(sequence <= last.unsqueeze(1), self._pad_id)
        steps = min(self._max_new_tokens, prompt.shape[1] - 1 - int(last.max()))
        positions = row_positions(prompt, self._image_token_id).to(device)
        tokens, last = prompt.to(device), last.to(device)
        position_ids = text.position_ids.to(device)
        sample = torch.arange(tokens.shape[0], device=device)
        group = language.groups.pg_collection.tp
        for step in range(steps):
            logits = language(tokens, position_ids, rows, positions)
            here = gather_from_tensor_model_parallel_region(logits[sample, last + step], group)
            tokens[sample, last + step + 1] = here.argmax(dim=-1)
        written = last.unsqueeze(1) + 1 + torch.arange(steps, device=device)
        return tokens.gather(1, written).cpu()

    def _until_eos(self, tokens: list[int]) -> tuple[int, ...]:
        stop = tokens.index(self._eos_id) + 1 if self._eos_id in tokens else len(tokens)
        return tuple(tokens[:stop])
