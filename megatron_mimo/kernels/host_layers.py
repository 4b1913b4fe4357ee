"""Linear layers and experts for hosts: megatron-core's, without work that changes nothing.

On a host a pass over a wide activation costs as much as a tenth of the product that made it, and a
layer without tokens as much as one with a few.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor


class HostColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel layer that leaves no bias for its caller to add."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Map [..., in] to [..., out / tp] of the same dtype, and None for the bias.

        Arguments and errors are those of megatron-core's layer.
        """
        if weight is not None or self.sequence_parallel or runtime_gather_output:
            output, bias = super().forward(input_, weight, runtime_gather_output)
            return output, bias
        if self.allreduce_dgrad:
            input_ = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        return F.linear(input_, self.weight, self.bias), None


class HostRowParallelLinear(RowParallelLinear):
    """Row-parallel layer that leaves a bias to its caller only where it sums over tp ranks."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map [..., in / tp] to [..., out] of the same dtype.

        Returns:
            Output [..., out], and the bias [out] that the caller has to add, or None.
        """
        if self.tp_group.size() > 1:
            output, bias = super().forward(input_)
            return output, bias
        return F.linear(input_, self.weight, self.bias), None


class HostExperts(SequentialMLP):
    """Experts one after the other; without gradients, only those that have tokens.

    With gradients all of them run: an expert without tokens has a gradient of zeros.
    """

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Map tokens [T, H], sorted by expert, to [T, H] of the same dtype, and None for the bias.

        Args:
            permuted_local_hidden_states: Tokens of the first expert, of the second, and so on.
            tokens_per_expert: Number of tokens of each expert, int64 [E].
            permuted_probs: Weight of each token, [T].
        """
        hidden, probs = permuted_local_hidden_states, permuted_probs
        few = not torch.is_grad_enabled() and self.num_local_experts > 1
        # Those that share an expert meet in it.
        if not few or self.tp_group.size() > 1 or self.config.moe_apply_probs_on_input:
            output, bias = super().forward(hidden, tokens_per_expert, probs)
            return output, bias
        counts = tokens_per_expert.tolist()
        outputs = [
            expert(tokens, weights)[0]
            for expert, tokens, weights in zip(
                self.local_experts, hidden.split(counts), probs.split(counts), strict=True
            )
            if len(tokens)
        ]
        return torch.cat(outputs) if outputs else hidden, None
