"""A layer of the encoder: half an MLP, attention, a convolution, half an MLP (Gulati, 2020)."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mimo.kernels.specs import norm_class, spec_provider
from megatron_mimo.media.audio.packing import PackedClips
from megatron_mimo.modules.parakeet.attention import Batch, relative_attention
from megatron_mimo.modules.parakeet.config import ParakeetConfig
from megatron_mimo.modules.parakeet.convolution import Convolution
from megatron_mimo.modules.parakeet.shards import sharded


class Layer(nn.Module):
    """A FastConformer layer over packed clips.

    Args:
        config: Architecture of the encoder.
        core_config: The same for megatron-core's layers.
        pg_collection: Groups of the module's grid.
        params_dtype: Dtype of the parameters and activations.
    """

    def __init__(
        self,
        config: ParakeetConfig,
        core_config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        params_dtype: torch.dtype,
    ) -> None:
        super().__init__()

        def norm() -> nn.Module:
            built: nn.Module = norm_class()(
                config=core_config,
                hidden_size=config.hidden_size,
                eps=core_config.layernorm_epsilon,
            )
            return built

        def mlp() -> MLP:
            provider = spec_provider()
            return MLP(
                core_config,
                MLPSubmodules(
                    linear_fc1=provider.column_parallel_linear(),
                    linear_fc2=provider.row_parallel_linear(),
                ),
                tp_group=pg_collection.tp,
            )

        self.norm_feed_forward1, self.feed_forward1 = norm(), mlp()
        self.norm_self_attention = norm()
        self.self_attention = SelfAttention(config, core_config, pg_collection, params_dtype)
        self.norm_convolution = norm()
        self.convolution = Convolution(config, pg_collection, params_dtype)
        self.norm_feed_forward2, self.feed_forward2 = norm(), mlp()
        self.norm_out = norm()

    def forward(
        self, x: Tensor, clips: PackedClips, positions: Tensor, batches: tuple[Batch, ...]
    ) -> Tensor:
        """Map rows [R, H] to rows [R, H] of the same dtype.

        Args:
            x: Rows of all clips.
            clips: Packed clips.
            positions: Sinusoids of the distances N-1 to -(N-1), [2N-1, H].
            batches: Clips by batch of attention.
        """
        x = torch.add(x, _whole(self.feed_forward1(self.norm_feed_forward1(x))), alpha=0.5)
        x = x + self.self_attention(self.norm_self_attention(x), positions, batches)
        x = x + self.convolution(self.norm_convolution(x), clips)
        x = torch.add(x, _whole(self.feed_forward2(self.norm_feed_forward2(x))), alpha=0.5)
        normed: Tensor = self.norm_out(x)
        return normed


class SelfAttention(nn.Module):
    """Attention with relative positions; tensor-parallel ranks share the heads."""

    def __init__(
        self,
        config: ParakeetConfig,
        core_config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        params_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        width, heads, tp = config.hidden_size, config.num_attention_heads, pg_collection.tp
        self.heads, self.head_dim = heads // tp.size(), width // heads
        provider = spec_provider()

        def column(outputs: int, *, bias: bool) -> nn.Module:
            built: nn.Module = provider.column_parallel_linear()(
                width,
                outputs,
                config=core_config,
                init_method=core_config.init_method,
                gather_output=False,
                bias=bias,
                skip_bias_add=False,
                is_expert=False,
                tp_group=tp,
            )
            return built

        self.linear_qkv = column(3 * width, bias=config.attention_bias)
        # Of the distances, which have no gradient and no bias.
        self.relative_k_proj = column(width, bias=False)
        self.linear_proj: nn.Module = provider.row_parallel_linear()(
            width,
            width,
            config=core_config,
            init_method=core_config.init_method,
            bias=config.attention_bias,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=tp,
        )
        drawn = torch.empty(2, heads, self.head_dim, dtype=params_dtype)
        drawn.normal_(std=config.init_method_std)
        self.bias_u, self.bias_v = (sharded(bias, tp) for bias in drawn)

    def forward(self, x: Tensor, positions: Tensor, batches: tuple[Batch, ...]) -> Tensor:
        """Map normed rows [R, H] to what is added to the rows, [R, H]."""
        qkv: Tensor = self.linear_qkv(x)[0]
        relative: Tensor = self.relative_k_proj(positions)[0]
        attended = relative_attention(
            # megatron-core's order: query, key and value of a head, then those of the next.
            qkv.view(-1, self.heads, 3, self.head_dim),
            relative.view(-1, self.heads, self.head_dim),
            self.bias_u,
            self.bias_v,
            batches,
        )
        return _whole(self.linear_proj(attended))


def _whole(output: tuple[Tensor, Tensor | None]) -> Tensor:
    """What a layer of megatron-core returns, with the bias that it leaves to its caller."""
    found, bias = output
    return found if bias is None else found + bias
