"""From the encoder's rows to the language model's width."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor, nn

from megatron_mimo.encoders.config import ProjectorConfig
from megatron_mimo.runtime.engine import transformer_config
from megatron_mimo.runtime.specs import norm_class, spec_provider


class Projector(nn.Module):
    """LayerNorm and a two-layer GELU MLP, tensor-parallel.

    Args:
        config: The architecture.
        input_size: Width of a row from the encoder.
        output_size: H of the language model.
        pg_collection: Groups of the encoder's grid.
        params_dtype: Dtype of the parameters and activations.
    """

    def __init__(
        self,
        config: ProjectorConfig,
        input_size: int,
        output_size: int,
        pg_collection: ProcessGroupCollection,
        params_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        mlp_config = transformer_config(
            pg_collection,
            params_dtype=params_dtype,
            sequence_parallel=False,
            num_layers=1,
            hidden_size=output_size,
            # An MLP has no heads; the engine wants a number that its tp size divides.
            num_attention_heads=pg_collection.tp.size(),
            ffn_hidden_size=config.ffn_hidden_size,
            layernorm_epsilon=config.layernorm_epsilon,
            init_method_std=config.init_method_std,
        )
        self.norm = norm_class()(
            config=mlp_config, hidden_size=input_size, eps=config.layernorm_epsilon
        )
        provider = spec_provider()
        self.mlp = MLP(
            mlp_config,
            MLPSubmodules(
                linear_fc1=provider.column_parallel_linear(),
                linear_fc2=provider.row_parallel_linear(),
            ),
            input_size=input_size,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=pg_collection.tp,
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Project [R, input_size] to [R, output_size], the same on every tp rank."""
        output: Tensor
        output, bias = self.mlp(self.norm(rows))
        return output if bias is None else output + bias
