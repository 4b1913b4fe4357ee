"""The Parakeet encoder over packed clips of any length."""

import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import init_method_normal
from torch import Tensor, nn

from megatron_mimo.media.audio.packing import PackedClips
from megatron_mimo.modules.parakeet.activations import ACTIVATIONS
from megatron_mimo.modules.parakeet.attention import batches_on
from megatron_mimo.modules.parakeet.batch_norm import BatchNorm
from megatron_mimo.modules.parakeet.config import ParakeetConfig
from megatron_mimo.modules.parakeet.layer import Layer
from megatron_mimo.modules.parakeet.subsampling import Subsampling
from megatron_mimo.runtime.megatron_core import is_first_stage, is_last_stage, transformer_config

# Of the sinusoids, as in Vaswani et al. 2017, section 3.5.
_BASE = 10_000.0


class ParakeetEncoder(nn.Module):
    """A pipeline stage of the encoder: from mel features of many clips to rows.

    All clips form one sequence, and nothing that it computes reaches from one clip into another.

    Args:
        config: Architecture of the encoder.
        pg_collection: Groups of the module's grid.
        params_dtype: Dtype of the parameters and activations.
        initialize: Whether to draw the initial weights of megatron-core's layers; otherwise they
            are undefined.
    """

    def __init__(
        self,
        config: ParakeetConfig,
        pg_collection: ProcessGroupCollection,
        params_dtype: torch.dtype,
        *,
        initialize: bool = True,
    ) -> None:
        super().__init__()
        self.parakeet_config = config
        self.frozen = False
        self.is_first, self.is_last = is_first_stage(pg_collection), is_last_stage(pg_collection)
        # Sequence parallelism stays off: packed lengths do not divide by the tp size.
        self.config = transformer_config(
            pg_collection,
            params_dtype=params_dtype,
            sequence_parallel=False,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            ffn_hidden_size=config.ffn_hidden_size,
            activation_func=ACTIVATIONS[config.activation],
            add_bias_linear=config.attention_bias,
            layernorm_epsilon=1e-5,
            init_method_std=config.init_method_std,
            # Not smaller towards the residual stream: as transformers.
            output_layer_init_method=init_method_normal(config.init_method_std),
            perform_initialization=initialize,
        )
        if self.is_first:
            self.subsampling = Subsampling(config, params_dtype)
        held = config.num_layers // pg_collection.pp.size()
        first = held * pg_collection.pp.rank()
        # By their numbers over all stages, which are their names in checkpoints.
        self.layers = nn.ModuleDict(
            {
                str(number): Layer(config, self.config, pg_collection, params_dtype)
                for number in range(first, first + held)
            }
        )
        self._sinusoids: Tensor | None = None

    def freeze(self) -> None:
        """Freeze all parameters, and stay in evaluation mode whatever `train` is called with."""
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "ParakeetEncoder":
        """Switch between training and evaluation; a frozen encoder stays in evaluation."""
        return super().train(mode and not self.frozen)

    def idle(self, *, backward: bool) -> None:
        """Do what data-parallel ranks do together in a forward or backward, without a clip."""
        norms = [module for module in self.modules() if isinstance(module, BatchNorm)]
        for norm in reversed(norms) if backward else norms:
            norm.idle(backward=backward)

    def forward(self, clips: PackedClips, hidden: Tensor | None = None) -> Tensor:
        """Encode packed clips.

        Args:
            clips: Packed clips on this stage's device.
            hidden: Rows of the previous stage [R, H]; None on the first stage.

        Returns:
            Rows after this stage [R, H], the shortest clip first, in the dtype of parameters. They
            are not part of an autograd graph where the encoder is frozen.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if self.is_first:
                hidden = self.subsampling(clips)
                if self.parakeet_config.scale_input:
                    hidden = hidden * math.sqrt(self.parakeet_config.hidden_size)
            assert hidden is not None
            batches = batches_on(hidden.device, clips.lengths, clips.valid)
            positions = self._positions(max(clips.lengths), hidden)
            for layer in self.layers.values():
                hidden = layer(hidden, clips, positions, batches)
            return hidden

    def _positions(self, length: int, like: Tensor) -> Tensor:
        """Sinusoids of the distances length-1 to -(length-1), [2*length-1, H]."""
        held = self._sinusoids
        if held is None or held.device != like.device or held.size(0) < 2 * length - 1:
            held = self._sinusoids = sinusoids(length, like.size(1)).to(like)
        middle = held.size(0) // 2
        return held[middle - length + 1 : middle + length].to(like.dtype)


def sinusoids(length: int, width: int) -> Tensor:
    """Sine and cosine, in turns, of each distance length-1 to -(length-1), float32 [2*length-1, H].

    Args:
        length: Number of distances from 0 on.
        width: Number of sines and cosines, H.
    """
    rates = 1 / _BASE ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(length - 1, -length, -1, dtype=torch.float32)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
