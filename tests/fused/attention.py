"""Attention of Transformer Engine with torch's, behind the checks that its forward makes.

Everything below `DotProductAttention.forward` chooses among kernels for the GPU that is there, so
the method is replaced as a whole. What it refuses is refused here too: a layer that passes float
sequence bounds, or a mask that packed sequences cannot have, fails on a host as on a GPU. Under
context parallelism it goes on in the package's own code, over the kernels in `context_parallel`.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CONTEXT_PARALLEL = "transformer_engine.pytorch.attention.dot_product_attention.context_parallel"
"""The module that shares a sequence out among ranks."""

seen: set[tuple[str, str]] = set()
"""Layouts and masks of the calls in this process."""


def forward(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    qkv_format: str | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    attn_mask_type: str | None = None,
    window_size: Any = None,
    num_splits: int = 1,
    pad_between_seqs: bool | None = None,
) -> Tensor:
    """Attention over [S, B, A, D], or over packed [T, A, D]; returns [S, B, A*D] or [T, A*D]."""
    layout = qkv_format or self.qkv_format
    mask = attn_mask_type or self.attn_mask_type
    assert {query.dtype, key.dtype, value.dtype} == {query.dtype}
    seen.add((layout, mask))
    if self.cp_group is not None and torch.distributed.get_world_size(self.cp_group) > 1:
        assert layout == "sbhd", f"context parallelism with {layout}: write it in tests/fused"
        return _context_parallel(self, query, key, value, mask)
    causal, options = "causal" in mask, {"enable_gqa": query.shape[-2] != key.shape[-2]}
    if layout == "thd":
        assert query.dim() == key.dim() == value.dim() == 3
        assert "padding" in mask, f"packed sequences with mask {mask}"
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        assert cu_seqlens_q.shape == cu_seqlens_kv.shape and cu_seqlens_q.dim() == 1
        assert type(max_seqlen_q) is int and type(max_seqlen_kv) is int
        lengths = cu_seqlens_q.diff()
        assert int(lengths.max()) <= max_seqlen_q and int(lengths.sum()) == len(query)
        return torch.cat(
            [
                F.scaled_dot_product_attention(
                    *(part.transpose(0, 1)[None] for part in parts), is_causal=causal, **options
                )[0].transpose(0, 1)
                for parts in zip(
                    *(x.split(lengths.tolist()) for x in (query, key, value)), strict=True
                )
            ]
        ).flatten(1)
    assert layout == "sbhd" and query.dim() == 4 and mask in ("causal", "no_mask"), (layout, mask)
    output = F.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (query, key, value)), is_causal=causal, **options
    )
    return output.permute(2, 0, 1, 3).flatten(2)


def _context_parallel(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: str) -> Tensor:
    """As the package's `FusedAttention` goes on, with the arguments that our layers have."""
    parallel: Any = import_module(CONTEXT_PARALLEL)
    length, batch = query.size(0) * torch.distributed.get_world_size(self.cp_group), query.size(1)
    bounds = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32)
    output: Tensor = parallel.attn_forward_func_with_cp(
        self.training,
        *(x.contiguous() for x in (query, key, value)),
        bounds,
        bounds,
        length,
        length,
        None,
        None,
        self.attention_dropout if self.training else 0.0,
        self.cp_group,
        self.cp_global_ranks,
        self.cp_stream,
        self.cp_comm_type,
        softmax_scale=self.fused_attention.softmax_scale,
        qkv_format="sbhd",
        attn_mask_type=mask,
        use_fused_attention=True,
    )
    return output.flatten(2)
