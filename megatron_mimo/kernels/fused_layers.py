"""Layers of Transformer Engine, with what it lacks. To be imported only where it is present."""

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_mimo.kernels.attention import CAUSAL
from megatron_mimo.kernels.cut_attention import attend_packed_over_cut


class FusedSpecProvider(TESpecProvider):
    """megatron-core's provider of Transformer Engine's layers."""

    def core_attention(self) -> type:
        """Attention that also takes packed sequences over context-parallel ranks."""
        return FusedCoreAttention


class FusedCoreAttention(TEDotProductAttention):
    """Transformer Engine's attention, but for packed sequences over context-parallel ranks.

    Its own context parallelism asks that every document be padded to a multiple of twice the ranks,
    and gives every rank two parts of each. Ours takes the cut that the rest of the model has.

    Args:
        args: Positional arguments of megatron-core's class.
        softmax_scale: Factor of the scores in place of 1 / sqrt(D).
        kwargs: Keyword arguments of megatron-core's class.
    """

    def __init__(self, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, softmax_scale=softmax_scale, **kwargs)
        self._scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        """Attention as `SdpaCoreAttention.forward` describes it.

        Args:
            query: Queries [S, B, A, D], or packed [T, A, D].
            key: Keys [S, B, G, D], or packed [T, G, D]; G divides A.
            value: Values, with the shape of `key`.
            attention_mask: Mask of the attention, if any.
            attn_mask_type: Type of mask.
            attention_bias: Bias of the scores, if any.
            packed_seq_params: Boundaries of a packed sequence.
            num_splits: Number of parts that the kernel divides keys into.

        Returns:
            Output [S, B, A*D], or [T, A*D].

        Raises:
            ValueError: Context-parallel ranks share a packed sequence without its cut, or dropout
                is asked for there.
        """
        if packed_seq_params is not None and self.config.context_parallel_size > 1:
            return attend_packed_over_cut(
                query,
                key,
                value,
                packed_seq_params,
                self.cp_group,
                causal=attn_mask_type in CAUSAL,
                dropout=self.attention_dropout if self.training else 0.0,
                scale=self._scale,
            )
        output: Tensor = super().forward(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
            num_splits=num_splits,
        )
        return output
