"""Boundaries of packed (thd) sequences, as modules pass them to attention."""

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_mimo.kernels.cut import DocumentCut


@dataclass
class PackedSegments(PackedSeqParams):
    """Boundaries of a packed sequence whose lengths the host knows without a device sync.

    Under context parallelism boundaries, lengths and `seq_idx` are those of the whole sequence, of
    which each rank holds a part.

    Attributes:
        lengths: Number of tokens of each segment.
        positions: Position of each token of this rank in its segment, int64 [T], for attention that
            rotates queries and keys by it; None where none does.
        cut: Which tokens each context-parallel rank holds; None where each holds all.
    """

    lengths: tuple[int, ...] = ()
    positions: Tensor | None = None
    cut: DocumentCut | None = None


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


def packed_documents(
    cu_seqlens: Tensor,
    lengths: tuple[int, ...],
    cut: DocumentCut | None = None,
    cp_rank: int = 0,
) -> PackedSegments:
    """`packed_segments` for a language model, whose layers also ask where each token stands.

    Args:
        cu_seqlens: Cumulative lengths, int32 [N+1], on the device of the tokens.
        lengths: The N lengths, known to the host.
        cut: Which tokens each context-parallel rank holds; None where there is one.
        cp_rank: Context-parallel rank of this process.

    Returns:
        Boundaries, with the document of each token of the sequence in `seq_idx`, int32 [1, T], for
        Mamba layers, and the `positions` of this rank's tokens for rotary embeddings.
    """
    segments = packed_segments(cu_seqlens, lengths)
    # Counted out on the host: there the lengths are, and a copy does not wait for the device.
    seq_idx = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    parts = [(0, length) for length in lengths]
    if cut is not None and len(cut.pieces) > 1:
        segments.cut = cut
        parts = [(piece.start, piece.stop) for piece in cut.pieces[cp_rank]]
    positions = np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in parts])
    device = cu_seqlens.device
    segments.seq_idx = torch.from_numpy(seq_idx)[None].to(device, non_blocking=True)
    segments.positions = torch.from_numpy(positions).to(device, non_blocking=True)
    return segments


def cut_of(packed: PackedSeqParams, ranks: int) -> DocumentCut:
    """The cut of a packed sequence that context-parallel ranks share.

    Args:
        packed: Boundaries of the sequence.
        ranks: Number of the ranks.

    Raises:
        ValueError: They come without a cut, or with one for another number of ranks.
    """
    cut = packed.cut if isinstance(packed, PackedSegments) else None
    if cut is None:
        raise ValueError(
            "a packed sequence over context-parallel ranks without its cut: pass `PackedSegments` "
            "whose `cut` says which rank holds which tokens"
        )
    if len(cut.pieces) != ranks:
        raise ValueError(
            f"a packed sequence that is cut for {len(cut.pieces)} ranks, in a context-parallel "
            f"group of {ranks}: cut it with `cut_documents(lengths, {ranks})`"
        )
    return cut
