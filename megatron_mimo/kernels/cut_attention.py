"""Attention of a packed sequence whose tokens several context-parallel ranks share in any way.

Keys and values of split documents are gathered; each rank attends from its tokens, and the
gradients of what was gathered are summed and scattered back. See `cut_plan` for which tokens attend
to which.

Only what the rank holds is kept for backward, which gathers again: memory of activations falls with
the number of ranks, and no attention is computed twice.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_mimo.kernels.cut import DocumentCut
from megatron_mimo.kernels.cut_plan import CutPlan, Part, plan_cut
from megatron_mimo.kernels.packed import cut_of
from megatron_mimo.kernels.part_attention import PartAttention, part_attention


def attend_packed_over_cut(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedSeqParams,
    cp_group: Any,
    *,
    causal: bool,
    dropout: float,
    scale: float | None = None,
) -> Tensor:
    """`attend_over_cut` for a core attention, whose arguments may be ones that it cannot have.

    Args:
        query: Queries [T, A, D] of the rank, in its local order.
        key: Keys [T, G, D]; G divides A.
        value: Values, with the shape of `key`.
        packed: Boundaries of the packed sequence, with its cut.
        cp_group: Group of the ranks that share the sequence.
        causal: Whether tokens attend only to those before them in their document.
        dropout: Probability of dropout; must be 0.
        scale: Factor of the scores; None for 1 / sqrt(D).

    Returns:
        Output [T, A*D].

    Raises:
        ValueError: There is dropout, or no cut, or one that does not fit ranks or tokens.
    """
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} with packed sequences over context-parallel ranks, which "
            f"is not supported: set it to 0, or train without context parallelism or packing"
        )
    cut = cut_of(packed, cp_group.size())
    return attend_over_cut(query, key, value, cut, cp_group, causal=causal, scale=scale)


def attend_over_cut(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cut: DocumentCut,
    cp_group: Any,
    *,
    causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Attend within each document, from this rank's tokens to those of all ranks.

    All ranks of the group must call it, those without tokens too, forward and backward; ranks send
    nothing where no document is split.

    Args:
        query: Queries [T, A, D] of the rank, in its local order.
        key: Keys [T, G, D]; G divides A.
        value: Values, with the shape of `key`.
        cut: Which rank holds which tokens.
        cp_group: Group of the ranks that share the sequence.
        causal: Whether tokens attend only to those before them in their document.
        scale: Factor of the scores; None for 1 / sqrt(D).

    Returns:
        Output [T, A*D].

    Raises:
        ValueError: The cut gives the rank another number of tokens.
    """
    rank = cp_group.rank()
    plan = plan_cut(cut, rank, causal, query.device)
    if plan.num_tokens != query.size(0):
        raise ValueError(
            f"{query.size(0)} tokens on rank {rank} of a packed sequence whose cut gives it "
            f"{plan.num_tokens}: pass the cut that the tokens were taken by"
        )
    factor = query.size(-1) ** -0.5 if scale is None else scale
    output: Tensor = _CutAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, plan, cp_group, causal, factor
    )
    return output.flatten(1)


class _CutAttention(torch.autograd.Function):
    """[T, A, D] of queries, and twice [T, G, D] of keys and values, to [T, A, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: CutPlan,
        cp_group: Any,
        causal: bool,
        scale: float,
    ) -> Tensor:
        attention = part_attention(query)
        # On its way while the rank attends to keys of its own.
        gathering = _Gathering(key, value, plan, cp_group)
        output, logs = _attend_to_own(attention, query, key, value, plan.own, causal, scale)
        gathered = gathering.wait()
        if plan.gathered.groups:
            inputs = _inputs(query, *gathered, plan.gathered)
            more = attention.forward(*inputs, plan.gathered.groups, causal=False, scale=scale)
            _merge(output, logs, *more, plan.gathered.queries)
        ctx.save_for_backward(query, key, value, output, logs)
        ctx.plan, ctx.cp_group, ctx.causal, ctx.scale = plan, cp_group, causal, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logs = ctx.saved_tensors
        # Fused kernels take no gradient that is expanded, as that of a sum is.
        grad = gradients[0].contiguous()
        plan: CutPlan = ctx.plan
        attention = part_attention(query)
        gathering = _Gathering(key, value, plan, ctx.cp_group)

        def differentiate(part: Part, keys: Tensor, values: Tensor, causal: bool) -> Any:
            return attention.backward(
                _take(grad, part.queries),
                _inputs(query, keys, values, part),
                _take(output, part.queries),
                _take(logs, part.queries),
                part.groups,
                causal=causal,
                scale=ctx.scale,
            )

        own = differentiate(plan.own, key, value, ctx.causal) if plan.own.groups else ()
        if own and plan.own.queries is None:
            dq, dk, dv = (found.to(_wide(found)) for found in own)
        else:
            dq, dk, dv = (torch.zeros_like(x, dtype=_wide(x)) for x in (query, key, value))
            for total, found in zip((dq, dk, dv), own, strict=False):
                _add(total, found, plan.own.queries)
        gathered = gathering.wait()
        sums = [torch.zeros_like(x, dtype=_wide(x)) for x in gathered]
        if plan.gathered.groups:
            found_q, found_k, found_v = differentiate(plan.gathered, *gathered, causal=False)
            _add(dq, found_q, plan.gathered.queries)
            _add(sums[0], found_k, plan.gathered.keys)
            _add(sums[1], found_v, plan.gathered.keys)
        if plan.slots:
            _scatter(sums, (dk, dv), key.dtype, plan, ctx.cp_group)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), *(None,) * 4


class _Gathering:
    """Keys and values of split documents on their way from all ranks."""

    def __init__(self, key: Tensor, value: Tensor, plan: CutPlan, cp_group: Any) -> None:
        self._sizes = [key.size(-1), value.size(-1)]
        shape = (plan.slots, key.size(1), sum(self._sizes))
        # One message for both.
        sent = key.new_zeros(shape)
        torch.cat([key[plan.sent], value[plan.sent]], dim=-1, out=sent[: len(plan.sent)])
        self._parts = key.new_empty((cp_group.size() * plan.slots, *shape[1:]))
        self._work = None
        if plan.slots:
            self._work = dist.all_gather_into_tensor(
                self._parts, sent, group=cp_group, async_op=True
            )

    def wait(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [slots of all ranks, G, D] each."""
        if self._work is not None:
            self._work.wait()
        key, value = self._parts.split(self._sizes, dim=-1)
        return key, value


def _scatter(
    sums: list[Tensor],
    totals: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    plan: CutPlan,
    cp_group: Any,
) -> None:
    """Add what all ranks found for this rank's keys and values to their gradients."""
    sent = torch.cat(sums, dim=-1).to(dtype)
    received = sent.new_empty((plan.slots, *sent.shape[1:]))
    dist.reduce_scatter_tensor(received, sent, group=cp_group)
    parts = received[: len(plan.sent)].split([x.size(-1) for x in sums], dim=-1)
    for total, part in zip(totals, parts, strict=True):
        _add(total, part, plan.sent)


def _attend_to_own(
    attention: PartAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    part: Part,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [T, A, D] and logarithms [T, A], minus infinity for queries without a key."""
    if not part.groups:
        return query.new_zeros((*query.shape[:2], value.size(2))), _nothing(query)
    inputs = _inputs(query, key, value, part)
    output, logs = attention.forward(*inputs, part.groups, causal=causal, scale=scale)
    if part.queries is None:
        return output, logs
    whole = query.new_zeros((*query.shape[:2], value.size(2)))
    whole[part.queries] = output
    return whole, _nothing(query).index_copy_(0, part.queries, logs)


def _nothing(query: Tensor) -> Tensor:
    return query.new_full(query.shape[:2], -torch.inf, dtype=_wide(query))


def _merge(
    output: Tensor, logs: Tensor, more: Tensor, more_logs: Tensor, queries: Tensor | None
) -> None:
    """Merge the softmax over more keys of some queries into `output` and `logs`."""
    before = _take(logs, queries)
    total = torch.logaddexp(before, more_logs)
    merged = _take(output, queries) * (before - total).exp()[..., None]
    merged = (merged + more * (more_logs - total).exp()[..., None]).to(output.dtype)
    if queries is None:
        output.copy_(merged)
        logs.copy_(total)
    else:
        output.index_copy_(0, queries, merged)
        logs.index_copy_(0, queries, total)


def _inputs(query: Tensor, key: Tensor, value: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    return _take(query, part.queries), _take(key, part.keys), _take(value, part.keys)


def _take(tokens: Tensor, order: Tensor | None) -> Tensor:
    return tokens if order is None else tokens[order]


def _add(total: Tensor, found: Tensor, where: Tensor | None) -> None:
    if where is None:
        total.add_(found)
    else:
        # A key occurs several times where several pieces of its document attend to it.
        total.index_add_(0, where, found.to(total.dtype))


def _wide(x: Tensor) -> torch.dtype:
    """Dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
