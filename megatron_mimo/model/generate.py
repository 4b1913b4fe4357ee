"""Greedy answers from the model on its grids, with the layout of training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_mimo.data.loader.batch import Microbatch, TextBatch
from megatron_mimo.model.inputs import InputReader
from megatron_mimo.model.mimo import MimoModel
from megatron_mimo.model.program import MimoStep
from megatron_mimo.modules.language.merge import join_rows
from megatron_mimo.topology import ModuleGridSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Answer to one sample.

    Attributes:
        key: Key of the sample.
        expected: Numbers of the target tokens, end of sequence included.
        generated: Numbers of the tokens that the model wrote, up to the end of sequence or the
            limit.
    """

    key: str
    expected: tuple[int, ...]
    generated: tuple[int, ...]


class GreedyStep(MimoStep):
    """A step program whose forward writes answers token by token instead of scoring them.

    The answer is removed from the input first: the model sees the prompt and its own tokens only.
    The whole sequence runs again for each token, which suits evaluation of short answers.

    Attributes:
        answers: Answers to the samples of this rank's lane, in sample order.
    """

    def __init__(
        self,
        model: MimoModel,
        microbatches: Sequence[Microbatch],
        reader: InputReader,
        *,
        pad_id: int,
        eos_id: int,
        max_new_tokens: int,
    ) -> None:
        super().__init__(model, reader.prepare(microbatches))
        self._reader, self._microbatches = reader, microbatches
        if model.target is not None:
            _require_whole_sequences(model.target.groups.spec)
        self._pad_id = pad_id
        self._eos_id = eos_id
        self._max_new_tokens = max_new_tokens
        self.answers: list[Answer] = []

    @torch.no_grad()
    def forward_target(self, microbatch: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Append the answers to a microbatch.

        Args:
            microbatch: Index of the microbatch within the step.
            inputs: Source name -> its rows [R, H], in the model's dtype.

        Returns:
            A float32 scalar 0 in place of the loss.
        """
        text = self._microbatches[microbatch].text
        assert text is not None
        written = self._decode(text, inputs)
        for i, key in enumerate(text.sample_keys):
            targets = text.labels[i][text.loss_mask[i] > 0]
            self.answers.append(
                Answer(
                    key=key,
                    expected=tuple(targets.tolist()),
                    generated=self._until_eos(written[i]),
                )
            )
        return self.loss_sum

    def _decode(self, text: TextBatch, inputs: Mapping[str, Tensor]) -> list[list[int]]:
        """Tokens written after each prompt, as many as are allowed and as positions predict."""
        target, device = self._model.target, self._model.device
        assert target is not None
        # The first target position holds the last token of the prompt.
        last = text.loss_mask.gt(0).int().argmax(dim=1)
        batch, length = text.input_ids.shape
        prompt = text.input_ids.where(torch.arange(length) <= last.unsqueeze(1), self._pad_id)
        # A prompt that ends at position p leaves positions p to S - 1 to predict from. Shorter
        # prompts continue while longer ones are full; what those write falls after the sequence.
        room = [min(self._max_new_tokens, length - p) for p in last.tolist()]
        steps = max(room)
        places = self._reader.row_positions(prompt)
        rows, positions = join_rows(inputs, {name: places[name].to(device) for name in inputs})
        tokens = torch.nn.functional.pad(prompt, (0, steps), value=self._pad_id).to(device)
        last, position_ids = last.to(device), text.position_ids.to(device)
        sample = torch.arange(batch, device=device)
        group = target.groups.pg_collection.tp
        facts = {name: values.to(device) for name, values in text.facts.items()}
        # No labels, and a document in each sequence.
        more = (None, None, facts) if self._reader.tokens_on_every_stage else ()
        for step in range(steps):
            seen = tokens[:, :length].contiguous()
            logits = target(seen, position_ids, None, rows, positions, *more)
            here = logits[sample, (last + step).clamp(max=length - 1)]
            whole = gather_from_tensor_model_parallel_region(here, group)
            tokens[sample, last + step + 1] = whole.argmax(dim=-1)
        written = last.unsqueeze(1) + 1 + torch.arange(steps, device=device)
        answers: list[list[int]] = tokens.gather(1, written).tolist()
        return [mine[:limit] for mine, limit in zip(answers, room, strict=True)]

    def _until_eos(self, tokens: list[int]) -> tuple[int, ...]:
        stop = tokens.index(self._eos_id) + 1 if self._eos_id in tokens else len(tokens)
        return tuple(tokens[:stop])


def _require_whole_sequences(target: ModuleGridSpec) -> None:
    """Each new token needs the logits of the one before it, on the ranks that embed it."""
    for axis in ("pp", "cp"):
        if getattr(target, axis) > 1:
            raise ValueError(
                f"{target.flag(axis)} {getattr(target, axis)}: answers are written with "
                f"{target.flag(axis)} 1 only; evaluate the loss instead, or on another layout"
            )
