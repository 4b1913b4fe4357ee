"""Attention with relative positions inside each clip of a packed sequence.

The scores of a query i and a key j are ((q_i + u) k_j + (q_i + v) r_{i-j}) / sqrt(D), with a
projected sinusoid r for every distance (Dai et al. 2019, "Transformer-XL", section 3.3). Clips of
equal or almost equal length run as one batch; only their probabilities are kept for backward.
Shapes: R rows, A heads of this tp rank, D head dim, N rows of the longest clip, g clips of a batch
of n rows each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_mimo.runtime.staging import map_tensors

MOST_PADDING = 0.15
"""Largest share of a batch on a GPU that may be padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Consecutive clips that attention runs as one batch, padded to the longest.

    Attributes:
        first: Index of their first row.
        rows: Number of their rows.
        count: Number of clips, g.
        length: Number of rows of the longest, n.
        places: Place of each row in the batch, int64 [rows]; None if no clip is padded.
        hidden: Keys that no query sees but those in `idle`, bool [g, n]; None if there is none.
        idle: Clip and place of the queries that have no valid frame, int64 [2, E]; None without.
        idle_hidden: Keys that each of these does not see, bool [E, n]; None without.
    """

    first: int
    rows: int
    count: int
    length: int
    places: Tensor | None = None
    hidden: Tensor | None = None
    idle: Tensor | None = None
    idle_hidden: Tensor | None = None


def batches_on(
    device: torch.device, lengths: tuple[int, ...], valid: tuple[int, ...]
) -> tuple[Batch, ...]:
    """`plan_batches` for a device, with its indices there.

    On a GPU few large batches are faster, on a host no padding is.
    """
    plan = plan_batches(lengths, valid, 0.0 if device.type == "cpu" else MOST_PADDING)
    return map_tensors(plan, lambda tensor: tensor.to(device, non_blocking=True))


def plan_batches(lengths: Sequence[int], valid: Sequence[int], padding: float) -> tuple[Batch, ...]:
    """Batches of clips, with indices on the host; all layers of a stage use the same.

    Args:
        lengths: Number of rows of each clip, ascending.
        valid: Number of these rows that come from valid frames.
        padding: Largest share of a batch that may be padding.
    """
    return tuple(_batches(lengths, valid, padding))


def _batches(lengths: Sequence[int], valid: Sequence[int], padding: float) -> Iterator[Batch]:
    begin = row = 0
    while begin < len(lengths):
        end, rows = begin, 0
        while end < len(lengths):
            longer = rows + lengths[end]
            room = lengths[end] * (end + 1 - begin)
            if end > begin and room - longer > padding * room:
                break
            end, rows = end + 1, longer
        yield _batch(row, lengths[begin:end], valid[begin:end])
        begin, row = end, row + rows


def _batch(first: int, lengths: Sequence[int], valid: Sequence[int]) -> Batch:
    # Arrays, since tensors of a dry run have no content.
    count, length = len(lengths), lengths[-1]
    held, seen = (np.array(each)[:, None] for each in (lengths, valid))
    place = np.arange(length)
    batch = Batch(first=first, rows=sum(lengths), count=count, length=length)
    if lengths[0] < length:
        batch = replace(batch, places=torch.from_numpy(np.flatnonzero(place < held)))
    if min(valid) < length:
        batch = replace(batch, hidden=torch.from_numpy(place >= seen))
    idle = np.argwhere((place >= seen) & (place < held))
    if len(idle):
        unseen = place >= held[idle[:, 0]]
        batch = replace(
            batch,
            idle=torch.from_numpy(np.ascontiguousarray(idle.T)),
            idle_hidden=torch.from_numpy(unseen),
        )
    return batch


def relative_attention(
    qkv: Tensor, relative: Tensor, bias_u: Tensor, bias_v: Tensor, batches: tuple[Batch, ...]
) -> Tensor:
    """Attention of every clip to itself.

    A query without a valid frame, which transformers masks as padding, has all keys of its clip
    alike there, for its scores are all the lowest number. So it is here, gradients included.

    Args:
        qkv: Queries, keys and values of each head, [R, A, 3, D].
        relative: Projected sinusoids of the distances N-1 to -(N-1), [2N-1, A, D].
        bias_u: Added to queries before the product with keys, [A, D].
        bias_v: Added to queries before the product with sinusoids, [A, D].
        batches: Clips by batch, with indices on the same device.

    Returns:
        Output [R, A*D], of the same dtype.
    """
    output: Tensor = _RelativeAttention.apply(  # type: ignore[no-untyped-call]
        qkv, relative, bias_u, bias_v, batches
    )
    return output


class _RelativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        relative: Tensor,
        bias_u: Tensor,
        bias_v: Tensor,
        batches: tuple[Batch, ...],
    ) -> Tensor:
        output = qkv.new_empty(qkv.size(0), qkv.size(1), qkv.size(3))
        probabilities = []
        for batch in batches:
            run = _Run(batch, qkv, relative, bias_u, bias_v)
            probabilities.append(run.probabilities())
            attended = torch.bmm(probabilities[-1], run.value)
            _unbatched(attended, batch, output[batch.first : batch.first + batch.rows])
        ctx.save_for_backward(qkv, relative, bias_u, bias_v, *probabilities)
        ctx.batches = batches
        return output.flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, relative, bias_u, bias_v, *probabilities = ctx.saved_tensors
        gradient = gradient.view(qkv.size(0), qkv.size(1), qkv.size(3))
        of_qkv = torch.empty_like(qkv)
        of_relative = torch.zeros_like(relative, dtype=_wide(relative))
        of_u, of_v = (torch.zeros_like(bias, dtype=_wide(bias)) for bias in (bias_u, bias_v))
        for batch, probability in zip(ctx.batches, probabilities, strict=True):
            run = _Run(batch, qkv, relative, bias_u, bias_v)
            of_output = _batched(gradient[batch.first : batch.first + batch.rows], batch)
            rows = of_qkv[batch.first : batch.first + batch.rows]
            run.backward(probability, of_output, rows, run.distances(of_relative), of_u, of_v)
        return (
            of_qkv,
            of_relative.to(relative.dtype),
            of_u.to(bias_u.dtype),
            of_v.to(bias_v.dtype),
            None,
        )


class _Run:
    """Tensors of a batch, heads first: [A*g, n, D]."""

    def __init__(
        self, batch: Batch, qkv: Tensor, relative: Tensor, bias_u: Tensor, bias_v: Tensor
    ) -> None:
        rows = qkv[batch.first : batch.first + batch.rows]
        query, self.key, self.value = (_batched(rows[:, :, part], batch) for part in range(3))
        self.batch, self.heads, self.width = batch, qkv.size(1), qkv.size(3)
        self.scale = self.width**-0.5
        by_head = query.view(self.heads, -1, self.width)
        self.with_u = (by_head + bias_u[:, None]).mul_(self.scale).view_as(query)
        # All clips of a batch have the same distances: one product for a head.
        self.with_v = (by_head + bias_v[:, None]).mul_(self.scale)
        self.relative = self.distances(relative)

    def distances(self, relative: Tensor) -> Tensor:
        """Those of the distances that the clips have, [2n-1, A, D], in place."""
        middle, length = relative.size(0) // 2, self.batch.length
        return relative[middle - length + 1 : middle + length]

    def probabilities(self) -> Tensor:
        """[A*g, n, n], in the dtype of the queries."""
        batch = self.batch
        by_distance = torch.bmm(self.with_v, self.relative.permute(1, 2, 0))
        scores = torch.baddbmm(_shifted(by_distance, batch), self.with_u, self.key.mT)
        lowest = torch.finfo(scores.dtype).min
        shape = (self.heads, batch.count, batch.length, batch.length)
        if batch.hidden is not None:
            scores.view(shape).masked_fill_(batch.hidden[:, None], lowest)
        if batch.idle is not None and batch.idle_hidden is not None:
            clip, place = batch.idle
            alike = torch.zeros_like(batch.idle_hidden, dtype=scores.dtype)
            scores.view(shape)[:, clip, place] = alike.masked_fill_(batch.idle_hidden, lowest)
        return torch.softmax(scores, dim=-1, dtype=_wide(scores)).to(scores.dtype)

    def backward(
        self,
        probability: Tensor,
        of_output: Tensor,
        of_rows: Tensor,
        of_relative: Tensor,
        of_u: Tensor,
        of_v: Tensor,
    ) -> None:
        """Write the gradient of queries, keys and values, and add those of the other inputs."""
        batch = self.batch
        of_value = torch.bmm(probability.mT, of_output)
        of_scores = torch._softmax_backward_data(
            torch.bmm(of_output, self.value.mT), probability, -1, probability.dtype
        )
        of_with_u = torch.bmm(of_scores, self.key)
        of_key = torch.bmm(of_scores.mT, self.with_u)
        if batch.idle is not None:
            clip, place = batch.idle
            shape = (self.heads, batch.count, batch.length, batch.length)
            of_scores.view(shape)[:, clip, place] = 0
        by_distance = of_scores.new_zeros(
            self.heads, batch.count * batch.length, 2 * batch.length - 1
        )
        _shifted(by_distance, batch).copy_(of_scores)
        of_with_v = torch.bmm(by_distance, self.relative.transpose(0, 1))
        of_relative.add_(torch.bmm(by_distance.mT, self.with_v).transpose(0, 1))
        of_with_u = of_with_u.mul_(self.scale).view_as(of_with_v)
        of_with_v.mul_(self.scale)
        of_u.add_(of_with_u.sum(1, dtype=of_u.dtype))
        of_v.add_(of_with_v.sum(1, dtype=of_v.dtype))
        of_query = of_with_u.add_(of_with_v).view_as(of_key)
        for part, gradient in enumerate((of_query, of_key, of_value)):
            _unbatched(gradient, batch, of_rows[:, :, part])


def _shifted(by_distance: Tensor, batch: Batch) -> Tensor:
    """Values by distance [A, g*n, 2n-1] as values by key [A*g, n, n], in place.

    Distance i-j of row i is column n-1-i+j, so each row begins one column before the row above.
    """
    length = batch.length
    width = 2 * length - 1
    return by_distance.as_strided(
        (by_distance.size(0) * batch.count, length, length),
        (length * width, width - 1, 1),
        by_distance.storage_offset() + length - 1,
    )


def _batched(rows: Tensor, batch: Batch) -> Tensor:
    """Rows [rows, A, D] as [A*g, n, D], with zeros where a clip is padded."""
    if batch.places is not None:
        padded = rows.new_zeros(batch.count * batch.length, *rows.shape[1:])
        rows = padded.index_copy_(0, batch.places, rows)
    heads_first = rows.transpose(0, 1).contiguous()
    return heads_first.view(-1, batch.length, rows.size(2))


def _unbatched(batched: Tensor, batch: Batch, rows: Tensor) -> None:
    """Copy [A*g, n, D] into rows [rows, A, D], without padding."""
    found = batched.view(rows.size(1), -1, rows.size(2)).transpose(0, 1)
    rows.copy_(found if batch.places is None else found.index_select(0, batch.places))


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype of sums: float32, or float64 for such tensors."""
    return torch.promote_types(tensor.dtype, torch.float32)
