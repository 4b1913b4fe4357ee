"""Attention of parts of a sequence, below Transformer Engine's own context parallelism.

Its Python code sends keys and values around the ranks, merges what each part of them gives, and
does the same with gradients backwards. It calls `fused_attn_fwd` and `fused_attn_bwd` for a part,
with the arguments of `transformer_engine.pytorch.cpp_extensions.fused_attn`. Shapes: queries
[S, B, A, D], keys and values [K, B, G, D] with G dividing A.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def fused_attn_fwd(
    _is_training: bool,
    _max_seqlen_q: int,
    _max_seqlen_kv: int,
    _cu_seqlens_q: Tensor,
    _cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_scale: float,
    attn_mask_type: str,
    qkv_layout: str,
    dropout: float,
    **options: Any,
) -> tuple[Tensor, list[Tensor]]:
    """The output [S, B, A, D]; sums of exponentials as logarithms [B, A, S, 1], random state."""
    _require(qkv_layout, dropout, options)
    scores = _scores(q, k, attn_scale, attn_mask_type)
    total = scores.logsumexp(-1, keepdim=True)
    output = torch.einsum("bask,kbad->sbad", (scores - total).exp(), _each_head(v, q).float())
    return _as(q, output), [total, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    _max_seqlen_q: int,
    _max_seqlen_kv: int,
    _cu_seqlens_q: Tensor,
    _cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    *rest: Any,
    attn_scale: float,
    attn_mask_type: str,
    qkv_layout: str,
    dropout: float,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients of queries, keys and values, through the part of the sum that these keys have.

    `out` and the logarithms are those of all keys of the sequence. What lies between `dout` and the
    logarithms differs between versions.
    """
    _require(qkv_layout, dropout, options)
    (total, *_) = next(found for found in rest if isinstance(found, list | tuple))
    shares = (_scores(q, k, attn_scale, attn_mask_type) - total).exp()
    out, dout, query, key = out.float(), dout.float(), q.float(), _each_head(k, q).float()
    dv = torch.einsum("bask,sbad->kbad", shares, dout)
    dshares = torch.einsum("sbad,kbad->bask", dout, _each_head(v, q).float())
    through = torch.einsum("sbad,sbad->bas", dout, out)[..., None]
    dscores = shares * (dshares - through) * attn_scale
    dq = torch.einsum("bask,kbad->sbad", dscores, key)
    dk = torch.einsum("bask,sbad->kbad", dscores, query)
    return _as(q, dq), _as(k, _each_group(dk, k)), _as(v, _each_group(dv, v)), None


class _Message:
    """A message under way, which may be waited for again, as NCCL's may.

    gloo would wait for another one, without end.
    """

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        """Wait the first time."""
        if self._work is not None:
            self._work.wait()
        self._work = None


def waited_for_again(communicate: Callable[..., list[Any]]) -> Callable[..., list[_Message]]:
    """The package's function that sends and receives, for ranks of gloo."""

    @wraps(communicate)
    def communicate_on_host(*args: Any) -> list[_Message]:
        return [_Message(work) for work in communicate(*args)]

    return communicate_on_host


def _require(layout: str, dropout: float, options: dict[str, Any]) -> None:
    assert layout == "sbhd_sbhd_sbhd", f"layout {layout} has no stand-in: write it in tests/fused"
    assert dropout == 0.0 and options["attn_bias_type"] == "no_bias"


def _scores(q: Tensor, k: Tensor, scale: float, mask_type: str) -> Tensor:
    """Scores [B, A, S, K] in float32; what a query does not see is minus infinity."""
    scores = torch.einsum("sbad,kbad->bask", q.float(), _each_head(k, q).float()) * scale
    if mask_type == "no_mask":
        return scores
    assert mask_type == "causal" and q.size(0) == k.size(0), (mask_type, q.shape, k.shape)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf)


def _each_head(x: Tensor, q: Tensor) -> Tensor:
    """Of each group of heads [K, B, G, D], for each head: [K, B, A, D]."""
    return x.repeat_interleave(q.size(2) // x.size(2), dim=2)


def _each_group(x: Tensor, like: Tensor) -> Tensor:
    """Sums over the heads of each group: [K, B, A, D] to the shape of `like`, [K, B, G, D]."""
    return x.unflatten(2, (like.size(2), -1)).sum(3)


def _as(like: Tensor, x: Tensor) -> Tensor:
    """In the dtype of `like`, and in one piece, which the package's views of it rely on."""
    return x.to(like.dtype).contiguous()
