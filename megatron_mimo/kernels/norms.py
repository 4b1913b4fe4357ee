"""LayerNorm and RMSNorm that allow sequence parallelism, without Transformer Engine."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

_KINDS = ("LayerNorm", "RMSNorm")


class TorchNorm(nn.Module):
    """The norm that a configuration names, over the last dimension.

    Each parameter carries `sequence_parallel`: under sequence parallelism a tp rank normalises its
    tokens only, and megatron-core sums the marked parameters' gradients over the tp ranks.

    Args:
        config: Configuration that names the norm (`normalization`) and the dtype of its parameters.
        hidden_size: Number of channels H.
        eps: Number added to the variance.

    Raises:
        ValueError: The configuration names a norm other than LayerNorm and RMSNorm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        if config.normalization not in _KINDS:
            raise ValueError(
                f"normalization {config.normalization!r}: expected one of {', '.join(_KINDS)}"
            )
        self.normalization = config.normalization
        self.hidden_size = hidden_size
        self.eps = eps
        # A weight stored as its distance from one, so that weight decay pulls it there.
        self.zero_centered = config.layernorm_zero_centered_gamma
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(
            torch.full(
                (hidden_size,),
                0.0 if self.zero_centered else 1.0,
                dtype=config.params_dtype,
                device=device,
            )
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias: nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(
                torch.zeros(hidden_size, dtype=config.params_dtype, device=device)
            )
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., H]; statistics are fp32 or better, the output has the dtype of `x`."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        shape = (self.hidden_size,)
        if self.normalization == "RMSNorm":
            return F.rms_norm(x, shape, weight, self.eps)
        return F.layer_norm(x, shape, weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """Shape and kind, for printing a model."""
        return f"{self.normalization}({self.hidden_size}, eps={self.eps})"
