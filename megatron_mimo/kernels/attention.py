"""Core attention over torch's scaled dot product: for hosts, and GPUs without Transformer Engine.

Takes the place of megatron-core's `DotProductAttention`, which refuses packed sequences. Shapes: S
sequence, B batch, T packed tokens, A query heads and G key-value heads of this tp rank, D head dim.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mimo.kernels.cut_attention import attend_packed_over_cut
from megatron_mimo.kernels.packed import PackedSegments
from megatron_mimo.kernels.part_attention import varlen_attention
from megatron_mimo.kernels.segments import (
    SegmentPlan,
    Span,
    plan_in_place,
    plan_segments,
    spans,
)

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
"""Masks under which a token attends to those before it only."""

_MASKED = (AttnMaskType.padding, AttnMaskType.padding_causal, AttnMaskType.arbitrary)


class SdpaCoreAttention(MegatronModule):
    """Softmax attention without parameters, for sbhd and thd layouts, with grouped queries.

    Masks mean what they mean to Transformer Engine: `causal` and `no_mask` ignore `attention_mask`.

    Args:
        config: Configuration of the module.
        layer_number: Number of the layer, from 1; not used.
        attn_mask_type: Type of mask for calls that do not name one.
        attention_type: "self" or "cross"; not used.
        attention_dropout: Probability of dropout in place of the configuration's.
        softmax_scale: Factor of the scores in place of 1 / sqrt(D).
        cp_comm_type: Not used.
        pg_collection: Groups of the module. The ranks of its cp group share the sequence; heads are
            sharded by the caller.

    Raises:
        ValueError: The configuration asks for a feature that this attention does not have.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        _require_supported(config)
        self.cp_group: Any = None
        if config.context_parallel_size > 1:
            if pg_collection is None:
                raise ValueError("context parallelism needs pg_collection, the module's groups")
            self.cp_group = pg_collection.cp
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Compute attention; queries, keys, values and the output have the same dtype.

        Args:
            query: Queries [S, B, A, D], or packed [T, A, D].
            key: Keys [S, B, G, D], or packed [T, G, D]; G divides A.
            value: Values, with the shape of `key`.
            attention_mask: Mask, bool, that broadcasts to [B, A, S, S]; True hides a key. Not for
                packed sequences.
            attn_mask_type: Type of mask in place of the one given to the constructor.
            attention_bias: Must be None.
            packed_seq_params: Boundaries of the segments of a packed sequence; every segment
                attends to itself only.

        Returns:
            Output [S, B, A*D], or [T, A*D] with zeros for tokens outside every segment.

        Raises:
            ValueError: An attention bias is given, a packed sequence comes without boundaries or
                with ones that do not fit its tokens, or without its cut where context-parallel
                ranks share it, or the mask type is not supported here.
        """
        if attention_bias is not None:
            raise ValueError("attention bias is not supported without Transformer Engine")
        mask_type = attn_mask_type or self.attn_mask_type
        dropout = self.dropout if self.training else 0.0
        # Heads differ between tp ranks, so does their dropout, unless activations are sharded
        # over the sequence: then ranks are already in streams of their own.
        fork = dropout > 0.0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if fork else nullcontext():
            if query.dim() == 3:
                if packed_seq_params is None:
                    raise ValueError(
                        f"packed attention over {tuple(query.shape)} without packed_seq_params: "
                        f"pass the boundaries of its segments"
                    )
                return self._packed(query, key, value, mask_type, dropout, packed_seq_params)
            return self._batched(query, key, value, attention_mask, mask_type, dropout)

    def _batched(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        mask_type: AttnMaskType,
        dropout: float,
    ) -> Tensor:
        if self.config.context_parallel_size > 1:
            return self._context_parallel(query, key, value, mask_type, dropout)
        causal = mask_type in CAUSAL
        visible = None
        if attention_mask is not None and mask_type in _MASKED:
            visible = ~attention_mask
            if causal:
                visible = visible & _lower_triangle(query.size(0), key.size(0), query.device)
        elif mask_type == AttnMaskType.arbitrary:
            raise ValueError("mask type `arbitrary` needs an attention_mask")
        elif mask_type == AttnMaskType.causal_bottom_right:
            visible = _lower_triangle(query.size(0), key.size(0), query.device, at_end=True)
        output = self._attend(
            *(rearrange(x, "s b a d -> b a s d") for x in (query, key, value)),
            visible=visible,
            causal=causal,
            dropout=dropout,
        )
        return rearrange(output, "b a s d -> s b (a d)")

    def _context_parallel(
        self, query: Tensor, key: Tensor, value: Tensor, mask_type: AttnMaskType, dropout: float
    ) -> Tensor:
        """Attend from this rank's part of the sequence to all of it.

        Keys and values of all cp ranks are gathered; backward sums their gradients and scatters
        them. Each of a rank's two chunks attends only to positions before its end, so that every
        rank computes the same share of the triangle.
        """
        if mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
            raise ValueError(
                f"mask type `{mask_type.name}` with context parallelism: expected causal or "
                f"no_mask; others need Transformer Engine on a GPU"
            )
        sizes = [key.size(-1), value.size(-1)]
        whole = _whole_sequence(torch.cat([key, value], dim=-1), self.cp_group)
        key, value = (rearrange(x, "s b g d -> b g s d") for x in whole.split(sizes, dim=-1))
        query = rearrange(query, "s b a d -> b a s d")
        if mask_type == AttnMaskType.no_mask:
            output = self._attend(query, key, value, visible=None, causal=False, dropout=dropout)
            return rearrange(output, "b a s d -> s b (a d)")
        size, rank, outputs = self.cp_group.size(), self.cp_group.rank(), []
        for chunk, number in zip(query.chunk(2, dim=2), (rank, 2 * size - 1 - rank), strict=True):
            length = chunk.size(2)
            end = (number + 1) * length
            visible = _lower_triangle(length, end, query.device, at_end=True)
            outputs.append(
                self._attend(
                    chunk,
                    key[:, :, :end],
                    value[:, :, :end],
                    visible=visible,
                    causal=False,
                    dropout=dropout,
                )
            )
        return rearrange(torch.cat(outputs, dim=2), "b a s d -> s b (a d)")

    def _packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask_type: AttnMaskType,
        dropout: float,
        packed: PackedSeqParams,
    ) -> Tensor:
        if mask_type in (AttnMaskType.arbitrary, AttnMaskType.causal_bottom_right):
            raise ValueError(
                f"mask type `{mask_type.name}` with a packed sequence: "
                f"expected causal, padding_causal, no_mask or padding"
            )
        if self.config.context_parallel_size > 1:
            return attend_packed_over_cut(
                query,
                key,
                value,
                packed,
                self.cp_group,
                causal=mask_type in CAUSAL,
                dropout=dropout,
                scale=self.softmax_scale,
            )
        if varlen_attention is not None and _fits_varlen(query, packed, dropout):
            output: Tensor = varlen_attention.varlen_attn(
                query,
                key,
                value,
                packed.cu_seqlens_q,
                packed.cu_seqlens_kv,
                packed.max_seqlen_q,
                packed.max_seqlen_kv,
                scale=self.softmax_scale,
                window_size=(-1, 0 if mask_type in CAUSAL else -1),
                enable_gqa=query.size(1) != key.size(1),
            )
            return output.flatten(1)
        plan = _plan(packed, query.size(0), key.size(0))
        if not plan.groups:
            # Zeros, still a part of the graph: gradients of the inputs are zeros too.
            nothing = query[:0].sum() + key[:0].sum() + value[:0].sum()
            return nothing.expand(query.size(0), query.size(1) * value.size(2))
        query = _take(query, plan.q_order)
        key, value = _take(key, plan.kv_order), _take(value, plan.kv_order)
        q_sizes = [group.count * group.q_length for group in plan.groups]
        kv_sizes = [group.count * group.kv_length for group in plan.groups]
        pieces = zip(
            plan.groups,
            _split(query, q_sizes),
            _split(key, kv_sizes),
            _split(value, kv_sizes),
            strict=True,
        )
        outputs = []
        for group, *parts in pieces:
            # Views without einops, whose overhead shows where a segment has a few tokens.
            batch = (x.reshape(group.count, -1, *x.shape[1:]).transpose(1, 2) for x in parts)
            output = self._attend(*batch, visible=None, causal=mask_type in CAUSAL, dropout=dropout)
            outputs.append(output.transpose(1, 2).flatten(0, 1).flatten(1))
        if plan.out_order is None:
            return torch.cat(outputs)
        outputs.append(outputs[0].new_zeros(1, outputs[0].size(1)))
        return torch.cat(outputs)[plan.out_order.to(query.device)]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        visible: Tensor | None,
        causal: bool,
        dropout: float,
    ) -> Tensor:
        """Attend over [B, heads, S, D]; rows that see nothing come out as zeros."""
        if query.size(2) == 1 and query.size(1) != key.size(1) and visible is None and not causal:
            # A token that is written: heads that share keys become the queries of one head, so that
            # the keys of all tokens before it are not repeated.
            grouped = query.reshape(query.size(0), key.size(1), -1, query.size(3))
            together = F.scaled_dot_product_attention(
                grouped, key, value, dropout_p=dropout, scale=self.softmax_scale
            )
            return together.reshape(*query.shape[:3], value.size(3))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            dropout_p=dropout,
            is_causal=causal and visible is None,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )


def _fits_varlen(query: Tensor, packed: PackedSeqParams, dropout: float) -> bool:
    """Whether torch's fused kernel for segments of any length can take a call."""
    # It leaves tokens outside every segment undefined; `PackedSegments` have none.
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and isinstance(packed, PackedSegments)
        and dropout == 0.0
    )


def _require_supported(config: TransformerConfig) -> None:
    wants: dict[str, Any] = {
        "window_size": (config.window_size, None),
        "softmax_type": (config.softmax_type, "vanilla"),
    }
    for name, (value, supported) in wants.items():
        if value != supported:
            raise ValueError(
                f"{name}={value!r} needs Transformer Engine on a GPU: "
                f"attention here supports {name}={supported!r}"
            )


def _lower_triangle(
    num_queries: int, num_keys: int, device: torch.device, at_end: bool = False
) -> Tensor:
    """Mask, bool [Sq, Sk], of the keys a query sees; `at_end` aligns the last query and key."""
    shift = num_keys - num_queries if at_end else 0
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(shift)


def _whole_sequence(part: Tensor, cp_group: Any) -> Tensor:
    """All cp ranks' parts [s, ...], in the order of positions: [S, ...].

    A rank `r` of `n` holds chunks `r` and `2 * n - 1 - r`, one after the other.
    """
    parts = gather_from_sequence_parallel_region(part.contiguous(), group=cp_group)
    chunks = parts.view(cp_group.size(), 2, -1, *part.shape[1:])
    return torch.cat([chunks[:, 0], chunks[:, 1].flip(0)]).flatten(0, 1)


def _split(tokens: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Split tokens by sizes; tokens after the last segment are dropped."""
    used = sum(sizes)
    return torch.split(tokens if used == len(tokens) else tokens[:used], sizes)


def _take(tokens: Tensor, order: Tensor | None) -> Tensor:
    return tokens if order is None else tokens[order.to(tokens.device)]


def _plan(packed: PackedSeqParams, num_q: int, num_kv: int) -> SegmentPlan:
    if isinstance(packed, PackedSegments):
        if sum(packed.lengths) != num_q:
            raise ValueError(
                f"segments of {sum(packed.lengths)} tokens in a packed sequence of {num_q}: "
                f"they must cover it"
            )
        return plan_in_place(packed.lengths)
    q_spans = _spans(packed.cu_seqlens_q, packed.cu_seqlens_q_padded, num_q, "cu_seqlens_q")
    kv_spans = _spans(packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded, num_kv, "cu_seqlens_kv")
    return plan_segments(q_spans, kv_spans, num_q)


def _spans(
    boundaries: Tensor | None, padded: Tensor | None, num_tokens: int, name: str
) -> tuple[Span, ...]:
    if boundaries is None:
        boundaries, padded = padded, None
    if boundaries is None:
        raise ValueError(f"packed_seq_params without {name}: pass the boundaries of its segments")
    return spans(
        tuple(boundaries.tolist()),
        None if padded is None else tuple(padded.tolist()),
        num_tokens,
        name,
    )
