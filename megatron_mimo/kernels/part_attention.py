"""Attention to a part of the keys, forward and backward, such that parts can be merged.

The softmax over all keys is a weighted sum of the softmaxes over parts of them; the logarithms of
the sums of exponentials are the weights. Backward needs the output and the logarithms of the merged
softmax only, so every part is differentiated on its own.

Shapes: queries [Q, A, D], keys and values [K, G, D] with G dividing A, segment after segment in the
order of the groups; outputs as the queries, logarithms [Q, A] in float32, or float64 for float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_mimo.kernels.indices import to_device
from megatron_mimo.kernels.segments import SegmentGroup

Groups = tuple[SegmentGroup, ...]


class PartAttention(Protocol):
    """Softmax attention of segments to the keys of one part."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, groups: Groups, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output [Q, A, D], logarithms [Q, A]; `causal` segments have as many keys as queries."""

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        logs: Tensor,
        groups: Groups,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries [Q, A, D], keys and values [K, G, D], given the merged output."""


def part_attention(query: Tensor) -> PartAttention:
    """What computes attention of queries like these, [Q, A, D]."""
    if not query.is_cuda:
        return _Batched(_FLASH)
    half = query.dtype in (torch.float16, torch.bfloat16)
    width = query.size(-1)
    # Widths that flash attention has.
    if varlen_attention is not None and half and width % 8 == 0 and width <= 256:
        return _Varlen()
    return _Batched(_PLAIN)


class _Batched:
    """Segments of one shape run as a batch [N, heads, S, D]."""

    def __init__(self, kernel: "_Kernel") -> None:
        self._kernel = kernel

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, groups: Groups, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        outputs, logs = [], []
        heads, per_group = q.size(1), q.size(1) // k.size(1)
        for group, queries, keys in _batches(groups):
            folded = _Folded(group.count, heads, per_group, causal)
            out, log = self._kernel.forward(
                folded.queries(q[queries]),
                folded.keys(k[keys]),
                folded.keys(v[keys]),
                causal,
                scale,
            )
            outputs.append(folded.queries_back(out))
            logs.append(folded.queries_back(log[..., None])[..., 0])
        return torch.cat(outputs), torch.cat(logs)

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        logs: Tensor,
        groups: Groups,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = inputs
        heads, per_group = q.size(1), q.size(1) // k.size(1)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for group, queries, keys in _batches(groups):
            folded = _Folded(group.count, heads, per_group, causal)
            dq, dk, dv = self._kernel.backward(
                folded.queries(grad[queries]),
                folded.queries(q[queries]),
                folded.keys(k[keys]),
                folded.keys(v[keys]),
                folded.queries(output[queries]),
                folded.queries(logs[queries][..., None])[..., 0],
                causal,
                scale,
            )
            parts.append((folded.queries_back(dq), folded.keys_back(dk), folded.keys_back(dv)))
        dq, dk, dv = (torch.cat(part) for part in zip(*parts, strict=True))
        return dq, dk, dv


@dataclass(frozen=True, slots=True)
class _Folded:
    """Heads of a batch of segments such that queries and keys have equally many.

    Heads that share keys are more queries of one head, so that keys are not repeated. Under a
    causal mask every query has a place, so there keys are repeated instead.

    Attributes:
        segments: Number of segments N.
        heads: Number of query heads A.
        per_group: Number of query heads that share keys, A / G.
        causal: Whether a causal mask is used.
    """

    segments: int
    heads: int
    per_group: int
    causal: bool

    def queries(self, x: Tensor) -> Tensor:
        """[N * S, A, D] to [N, A, S, D], or [N, G, A / G * S, D]."""
        if self.causal or self.per_group == 1:
            return self._batched(x)
        x = x.reshape(self.segments, -1, self.heads // self.per_group, self.per_group, x.size(2))
        grouped: Tensor = x.permute(0, 2, 3, 1, 4).flatten(2, 3)
        return grouped

    def queries_back(self, x: Tensor) -> Tensor:
        """The inverse of `queries`."""
        if self.causal or self.per_group == 1:
            return x.transpose(1, 2).flatten(0, 1)
        x = x.unflatten(2, (self.per_group, -1)).permute(0, 3, 1, 2, 4)
        return x.reshape(-1, self.heads, x.size(4))

    def keys(self, x: Tensor) -> Tensor:
        """[N * S, G, D] to [N, A, S, D], or [N, G, S, D]."""
        if self.causal and self.per_group > 1:
            x = x.repeat_interleave(self.per_group, dim=1)
        return self._batched(x)

    def keys_back(self, x: Tensor) -> Tensor:
        """Sums of gradients, back to [N * S, G, D]."""
        x = x.transpose(1, 2).flatten(0, 1)
        if self.causal and self.per_group > 1:
            x = x.unflatten(1, (-1, self.per_group)).sum(2)
        return x

    def _batched(self, x: Tensor) -> Tensor:
        segments: Tensor = x.unflatten(0, (self.segments, -1))
        return segments.transpose(1, 2)


class _Kernel(Protocol):
    """Attention over [N, heads, S, D], and logarithms [N, heads, S]."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        logs: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class _Flash:
    """torch's fused kernel for hosts."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        output, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
        return output, logs

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        logs: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, output, logs, 0.0, causal, scale=scale
        )
        return dq, dk, dv


class _Plain:
    """Products and sums of torch, for devices and dtypes that no fused kernel takes."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, k, causal, scale)
        logs = scores.logsumexp(-1)
        return ((scores - logs[..., None]).exp() @ v.to(scores.dtype)).to(q.dtype), logs

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        logs: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shares = (self._scores(q, k, causal, scale) - logs[..., None]).exp()
        wide = [x.to(shares.dtype) for x in (grad, q, k, v, output)]
        through = (wide[0] * wide[4]).sum(-1, keepdim=True)
        dscores = shares * (wide[0] @ wide[3].mT - through) * scale
        gradients = dscores @ wide[2], dscores.mT @ wide[1], shares.mT @ wide[0]
        dq, dk, dv = (x.to(q.dtype) for x in gradients)
        return dq, dk, dv

    def _scores(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(dtype) @ k.to(dtype).mT * scale
        if not causal:
            return scores
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(later, -torch.inf)


_FLASH, _PLAIN = _Flash(), _Plain()


class _Varlen:
    """torch's fused kernel for segments of any length, on a GPU."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, groups: Groups, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        bounds = _bounds(groups, q.device)
        varlen: Any = varlen_attention
        output, logs = varlen.varlen_attn(
            q,
            k,
            v,
            bounds.queries,
            bounds.keys,
            bounds.longest_query,
            bounds.longest_key,
            return_aux=varlen.AuxRequest(lse=True),
            scale=scale,
            window_size=(-1, 0 if causal else -1),
            enable_gqa=q.size(1) != k.size(1),
        )
        return output, logs.mT

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        logs: Tensor,
        groups: Groups,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        bounds = _bounds(groups, grad.device)
        q, k, v = inputs
        dq, dk, dv = torch.ops.torch_attn._varlen_attn_backward(
            grad_out=grad,
            query=q,
            key=k,
            value=v,
            out=output,
            lse=logs.mT.contiguous(),
            cu_seq_q=bounds.queries,
            cu_seq_k=bounds.keys,
            max_q=bounds.longest_query,
            max_k=bounds.longest_key,
            is_causal=causal,
            # The random state of dropout, which there is none of.
            rng_state=torch.zeros(2, dtype=torch.uint64, device=grad.device),
            scale=scale,
            window_size=[-1, 0 if causal else -1],
        )
        return dq, dk, dv


class _Bounds(NamedTuple):
    """Cumulative lengths of segments, int32 [N + 1], and the longest of them."""

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int


@lru_cache(maxsize=64)
def _bounds(groups: Groups, device: torch.device) -> _Bounds:
    def cumulative(lengths: list[int]) -> Tensor:
        return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)

    queries = [group.q_length for group in groups for _ in range(group.count)]
    keys = [group.kv_length for group in groups for _ in range(group.count)]
    return _Bounds(cumulative(queries), cumulative(keys), max(queries), max(keys))


def _batches(groups: Groups) -> Iterator[tuple[SegmentGroup, slice, slice]]:
    """Each group with its queries and its keys."""
    query = key = 0
    for group in groups:
        num_queries, num_keys = group.count * group.q_length, group.count * group.kv_length
        yield group, slice(query, query + num_queries), slice(key, key + num_keys)
        query, key = query + num_queries, key + num_keys


def _import_varlen() -> Any:
    """Torch's module of `varlen_attn`; None before the versions whose signature is used here."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    return varlen if "enable_gqa" in signature(varlen.varlen_attn).parameters else None


varlen_attention = _import_varlen()
"""torch's module of fused attention of segments of any length; None where torch has none."""
