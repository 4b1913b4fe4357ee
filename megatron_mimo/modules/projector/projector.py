"""Projector from the rows of an encoder to the language model's width."""

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor, nn

from megatron_mimo.kernels.specs import norm_class, spec_provider
from megatron_mimo.modules.projector.config import ProjectorConfig
from megatron_mimo.runtime.megatron_core import transformer_config

_ACTIVATIONS = {"squared_relu": squared_relu, "gelu": F.gelu}


class Projector(nn.Module):
    """A norm, then a tensor-parallel MLP or one affine layer.

    Args:
        config: Architecture of the module.
        input_size: Width of a row of the encoder.
        output_size: Width of the language model, H.
        pg_collection: Groups of the module's grid.
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
        core_config = transformer_config(
            pg_collection,
            params_dtype=params_dtype,
            sequence_parallel=False,
            num_layers=1,
            hidden_size=output_size,
            # An MLP has no heads; the engine needs a number that its tp size divides.
            num_attention_heads=pg_collection.tp.size(),
            ffn_hidden_size=config.ffn_hidden_size,
            add_bias_linear=config.bias,
            activation_func=_ACTIVATIONS[config.activation],
            # The engine knows no norm by the name of "none".
            normalization="LayerNorm" if config.normalization == "none" else config.normalization,
            layernorm_epsilon=config.layernorm_epsilon,
            init_method_std=config.init_method_std,
        )
        self.norm = (
            None
            if config.normalization == "none"
            else norm_class()(
                config=core_config, hidden_size=input_size, eps=config.layernorm_epsilon
            )
        )
        self.linear = self.mlp = None
        if config.kind == "affine":
            # Transformer Engine's linear layers do not gather their output.
            self.linear = ColumnParallelLinear(
                input_size,
                output_size,
                config=core_config,
                init_method=core_config.init_method,
                bias=config.bias,
                gather_output=True,
                skip_bias_add=False,
                tp_group=pg_collection.tp,
            )
        else:
            provider = spec_provider()
            self.mlp = MLP(
                core_config,
                MLPSubmodules(
                    linear_fc1=provider.column_parallel_linear(),
                    linear_fc2=provider.row_parallel_linear(),
                ),
                input_size=input_size,
                ffn_hidden_size=config.ffn_hidden_size,
                tp_group=pg_collection.tp,
            )

    def forward(self, rows: Tensor) -> Tensor:
        """Project rows [R, input_size] to [R, output_size], same dtype, equal on all tp ranks."""
        if self.norm is not None:
            rows = self.norm(rows)
        layer = self.linear if self.mlp is None else self.mlp
        assert layer is not None
        output: Tensor
        output, bias = layer(rows)
        return output if bias is None else output + bias
