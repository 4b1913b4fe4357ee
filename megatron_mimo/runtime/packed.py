"""Boundaries of packed (thd) sequences, as modules hand them to attention."""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class PackedSegments(PackedSeqParams):
    """Boundaries of a packed sequence that the host knows too, so that nobody asks the device.

    Attributes:
        lengths: Tokens of each segment.
    """

    lengths: tuple[int, ...] = ()


def packed_segments(cu_seqlens: Tensor, lengths: tuple[int, ...]) -> PackedSegments:
    """Segments that attend to themselves, end to end without padding.

    Args:
        cu_seqlens: int32 [N+1] on the device of the tokens.
        lengths: The N lengths that it cumulates.
    """
    longest = max(lengths, default=0)
    return PackedSegments(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
    )


def packed_documents(cu_seqlens: Tensor, lengths: tuple[int, ...]) -> PackedSegments:
    """`packed_segments` for a model whose Mamba layers must tell documents apart too.

    Args:
        cu_seqlens: int32 [N+1] on the device of the tokens.
        lengths: The N lengths that it cumulates.
    """
    numbers = torch.arange(len(lengths), device=cu_seqlens.device).int()
    counts = torch.tensor(lengths, device=cu_seqlens.device)
    segments = packed_segments(cu_seqlens, lengths)
    segments.seq_idx = torch.repeat_interleave(numbers, counts, output_size=sum(lengths))[None]
    return segments
