"""One step of the model over its microbatches, as the executor calls it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_mimo.model.inputs import StepInputs
from megatron_mimo.model.mimo import MimoModel
from megatron_mimo.modules.language.merge import join_rows


class MimoStep:
    """Implements `schedule.executor.StepProgram`.

    Args:
        model: The modules of this rank.
        inputs: What their stages read of the step's data.
        loss_scale: Factor of the loss, so that float16 gradients do not vanish.

    Attributes:
        loss_sum: Summed cross entropy of this rank's target tokens so far, a float64 scalar; 0
            before the language model's last stage.
    """

    def __init__(self, model: MimoModel, inputs: StepInputs, loss_scale: float = 1.0) -> None:
        self._loss_scale = loss_scale
        self._model = model
        self._inputs = inputs
        self._sources, self._target = inputs.copy_sources(), inputs.copy_target()
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)

    def forward(self, module: str, microbatch: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """See `StepProgram.forward`: rows [R, H], hidden states [N, width] or the scaled loss."""
        if module == self._model.target_name:
            return self.forward_target(microbatch, inputs)
        packed = self._sources[module].take(microbatch)
        return self._model.modules[module](packed, inputs.get(module))

    def forward_target(self, microbatch: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Scaled sum of the lane's cross entropies, float32, or hidden states [s*B, H]."""
        target, text = self._model.target, self._target.take(microbatch)
        assert target is not None
        groups = target.groups
        hidden = rows = positions = None
        if groups.is_first_stage:
            rows, positions = join_rows(inputs, text.row_positions)
        else:
            hidden = inputs[groups.spec.name]
            hidden = hidden.view(self._model.sharding.shard_length, text.batch, -1)
        output = target(
            text.input_ids,
            text.position_ids,
            hidden,
            rows,
            positions,
            text.labels,
            text.documents,
            **_where_asked(padding=text.padding, facts=text.facts),
        )
        if text.loss_mask is None:
            return output.flatten(0, 1)
        loss = (output.float() * text.loss_mask).sum()
        self.loss_sum += loss.detach()
        return loss * self._loss_scale

    def begin_last_backward(self, module: str) -> None:
        """Let a module reduce gradients while its last backward of the step runs."""
        self._model.modules[module].begin_last_backward()

    def idle(self, module: str, backward: bool) -> None:
        """See `StepProgram.idle`."""
        self._model.modules[module].module.idle(backward=backward)

    def hidden_rows(self, module: str, microbatch: int) -> int:
        """Number N of the hidden states [N, width] that stages of a module send to the next."""
        if module == self._model.target_name:
            return self._inputs.target[microbatch].batch * self._model.sharding.shard_length
        packed = self._inputs.sources[module][microbatch]
        assert packed is not None
        return packed.num_tokens


def _where_asked(**arguments: Any) -> dict[str, Any]:
    """The arguments that the family of the language model takes: the others are None."""
    return {name: value for name, value in arguments.items() if value is not None}
