"""Linear layers for hosts: megatron-core's, with the bias added by the matrix product itself.

On a host a pass over a wide activation costs as much as a tenth of the product that made it.
"""

import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor


class HostColumnParallelLinear(ColumnParallelLinear):
    """Leaves no bias for its caller to add."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[..., in] to [..., out / tp], and None; otherwise as megatron-core's."""
        if weight is not None or self.sequence_parallel or runtime_gather_output:
            output, bias = super().forward(input_, weight, runtime_gather_output)
            return output, bias
        if self.allreduce_dgrad:
            input_ = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        return F.linear(input_, self.weight, self.bias), None


class HostRowParallelLinear(RowParallelLinear):
    """Leaves its caller a bias only where a sum over tp ranks comes before it."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., in / tp] to [..., out], and the bias that is still to be added, if any."""
        if self.tp_group.size() > 1:
            output, bias = super().forward(input_)
            return output, bias
        return F.linear(input_, self.weight, self.bias), None
