"""A trained scale per channel after attention and MLP (CaiT, Touvron et al. 2021, section 2)."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from torch import Tensor, nn

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class ScaledAdd(nn.Module):
    """Replacement for megatron-core's `get_bias_dropout_add` in a layer.

    Args:
        hidden_size: Number of channels H.
        dtype: Dtype of the scale.

    Attributes:
        scale: Scale of each channel, [H], initially ones.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward(self, training: bool, fused: bool) -> Add:
        """The function that adds a layer's output to the residual stream, both [..., H]."""
        add: Any = get_bias_dropout_add(training, fused)

        def scaled_add(
            output: tuple[Tensor, Tensor | None], residual: Tensor, probability: float
        ) -> Tensor:
            hidden, bias = output
            hidden = (hidden if bias is None else hidden + bias) * self.scale
            added: Tensor = add((hidden, None), residual, probability)
            return added

        return scaled_add
