"""Boundaries of packed (thd) sequences, as modules pass them to attention."""

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class PackedSegments(PackedSeqParams):
    """Boundaries of a packed sequence whose lengths the host knows without a device sync.

    Attributes:
        lengths: Number of tokens of each segment.
        positions: Position of each token in its segment, int64 [T], for attention that rotates
            queries and keys by it; None where none does.
    """

    lengths: tuple[int, ...] = ()
    positions: Tensor | None = None


def packed_segments(cu_seqlens: Tensor, lengths: tuple[int, ...]) -> PackedSegments:
    """Segments that attend to themselves, concatenated without padding.

    Args:
        cu_seqlens: Cumulative lengths, int32 [N+1], on the device of the tokens.
        lengths: The N lengths, known to the host.
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
    """`packed_segments` for a language model, whose layers also ask where each token stands.

    Args:
        cu_seqlens: Cumulative lengths, int32 [N+1], on the device of the tokens.
        lengths: The N lengths, known to the host.

    Returns:
        Boundaries, with the document of each token in `seq_idx`, int32 [1, T], for Mamba layers,
        and its `positions` for rotary embeddings.
    """
    segments = packed_segments(cu_seqlens, lengths)
    # Counted out on the host: there the lengths are, and a copy does not wait for the device.
    seq_idx = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    starts = np.cumsum((0, *lengths), dtype=np.int64)[:-1]
    positions = np.arange(len(seq_idx)) - np.repeat(starts, lengths)
    device = cu_seqlens.device
    segments.seq_idx = torch.from_numpy(seq_idx)[None].to(device, non_blocking=True)
    segments.positions = torch.from_numpy(positions).to(device, non_blocking=True)
    return segments
