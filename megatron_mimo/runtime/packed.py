"""Boundaries of packed (thd) sequences, as modules hand them to attention."""

from dataclasses import dataclass

import numpy as np
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
    segments = packed_segments(cu_seqlens, lengths)
    # Counted out on the host: there the lengths are, and a copy does not wait for the device.
    seq_idx = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    segments.seq_idx = torch.from_numpy(seq_idx)[None].to(cu_seqlens.device, non_blocking=True)
    return segments
