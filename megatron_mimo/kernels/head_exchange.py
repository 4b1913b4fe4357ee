"""Mamba over context-parallel ranks: parts of a sequence become parts of the heads, and back.

Convolution and scan run over whole documents, so each rank runs them over the whole sequence for
its share of the heads: one exchange among all ranks before, and one after. megatron-core's
`MambaContextParallel` does the same with five exchanges before, in its own order of tokens, and
needs Transformer Engine for packed sequences. Here tokens may be cut among ranks in any way.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_context_parallel import MambaContextParallel
from torch import Tensor

from megatron_mimo.kernels.cut import DocumentCut, Piece
from megatron_mimo.kernels.indices import to_device
from megatron_mimo.kernels.packed import cut_of


class HeadExchange(MambaContextParallel):
    """`MambaContextParallel` for sequences that are cut in any way, with one exchange each way.

    The constructor and the slices of weights are megatron-core's.
    """

    def pre_conv_ssm(
        self, input_: Tensor, packed_seq_params: PackedSeqParams | None = None
    ) -> Tensor:
        """All tokens of this rank's heads.

        Args:
            input_: Gate, input, B, C and steps of all heads of the tp rank for this rank's tokens,
                [S / cp, b, d].
            packed_seq_params: Boundaries of a packed sequence, with its cut; None for sequences in
                the zig-zag of megatron-core.

        Returns:
            The same of this rank's heads for all tokens in the order of the sequence: [S, b, W].

        Raises:
            ValueError: A packed sequence comes without its cut, or with one that does not give
                every rank as many tokens as this one has.
        """
        if self.cp_size == 1:
            return input_
        inner, state = self.d_inner_local_tp, self.ngroups_local_tp * self.d_state
        gate, x, b, c, steps = input_.split(
            [inner, inner, state, state, self.nheads_local_tp], dim=-1
        )
        parts = (gate, x, self._by_heads(b), self._by_heads(c), steps)
        # What each rank gets of every part, side by side.
        by_rank = torch.cat([part.unflatten(-1, (self.cp_size, -1)) for part in parts], dim=-1)
        order = _order(packed_seq_params, self.cp_size, input_.size(0), input_.device)
        exchanged: Tensor = _ToHeads.apply(  # type: ignore[no-untyped-call]
            by_rank, order, self.cp_group
        )
        return exchanged

    def post_conv_ssm(
        self, input_: Tensor, packed_seq_params: PackedSeqParams | None = None
    ) -> Tensor:
        """All heads of this rank's tokens.

        Args:
            input_: Output of this rank's heads for all tokens, [S, b, W].
            packed_seq_params: Boundaries as before the scan.

        Returns:
            The output of all heads of the tp rank for this rank's tokens, [S / cp, b, cp * W].
        """
        if self.cp_size == 1:
            return input_
        tokens = input_.size(0) // self.cp_size
        order = _order(packed_seq_params, self.cp_size, tokens, input_.device)
        exchanged: Tensor = _ToTokens.apply(  # type: ignore[no-untyped-call]
            input_, order, self.cp_group
        )
        return exchanged.flatten(-2)

    def _by_heads(self, groups: Tensor) -> Tensor:
        """B or C [..., g n], with groups repeated whose heads several ranks have."""
        if self.group_repeat_count == 1:
            return groups
        each: Tensor = groups.unflatten(-1, (self.ngroups_local_tp, 1, self.d_state))
        # Not gathered by an index: gradients of the repeats are then summed in a fixed order.
        repeats = (-1,) * (each.dim() - 2) + (self.group_repeat_count, -1)
        return each.expand(repeats).flatten(-3)


class _Order(NamedTuple):
    """Places of tokens where ranks' parts are one after another, int64 [S].

    Attributes:
        places: Place of each token, in the order of the sequence.
        positions: Position in the sequence of the token at each place.
    """

    places: Tensor
    positions: Tensor


def _order(packed: PackedSeqParams | None, size: int, tokens: int, device: torch.device) -> _Order:
    """Order of the tokens of a sequence, of which each rank has `tokens`."""
    if packed is None:
        return _order_of(_zigzag(tokens * size, size), device)
    cut = cut_of(packed, size)
    if any(number != tokens for number in cut.tokens):
        raise ValueError(
            f"a rank has {tokens} tokens of a packed sequence whose cut gives {list(cut.tokens)} "
            f"to the ranks: Mamba layers need equally many on each"
        )
    return _order_of(cut, device)


@lru_cache(maxsize=32)
def _order_of(cut: DocumentCut, device: torch.device) -> _Order:
    """Indices of a cut, which layers share."""
    positions = torch.cat(
        [torch.arange(start, stop) for mine in cut.intervals for start, stop in mine]
    )
    places = torch.empty_like(positions)
    places[positions] = torch.arange(len(positions))
    return _Order(to_device(places, device), to_device(positions, device))


@lru_cache(maxsize=32)
def _zigzag(length: int, size: int) -> DocumentCut:
    """megatron-core's cut of a whole sequence: rank r has chunks r and 2 * size - 1 - r."""
    chunk = length // (2 * size)
    pieces = tuple(
        tuple(Piece(0, i * chunk, (i + 1) * chunk) for i in (rank, 2 * size - 1 - rank))
        for rank in range(size)
    )
    return DocumentCut((length,), pieces)


class _ToHeads(torch.autograd.Function):
    """[S / cp, b, cp, W] of this rank's tokens to [S, b, W] of its heads."""

    @staticmethod
    def forward(ctx: Any, by_rank: Tensor, order: _Order, cp_group: Any) -> Tensor:
        ctx.order, ctx.cp_group = order, cp_group
        return _to_heads(by_rank, order, cp_group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # Tokens only move, so gradients move back.
        return _to_tokens(gradients[0], ctx.order, ctx.cp_group), None, None


class _ToTokens(torch.autograd.Function):
    """[S, b, W] of this rank's heads to [S / cp, b, cp, W] of its tokens."""

    @staticmethod
    def forward(ctx: Any, of_heads: Tensor, order: _Order, cp_group: Any) -> Tensor:
        ctx.order, ctx.cp_group = order, cp_group
        return _to_tokens(of_heads, order, cp_group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _to_heads(gradients[0], ctx.order, ctx.cp_group), None, None


def _to_heads(by_rank: Tensor, order: _Order, cp_group: Any) -> Tensor:
    sent = by_rank.movedim(2, 0).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=cp_group)
    return received.flatten(0, 1).index_select(0, order.places)


def _to_tokens(of_heads: Tensor, order: _Order, cp_group: Any) -> Tensor:
    sent = of_heads.index_select(0, order.positions).unflatten(0, (cp_group.size(), -1))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=cp_group)
    return received.movedim(0, 2)
