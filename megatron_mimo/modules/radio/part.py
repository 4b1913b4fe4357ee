"""The part of packed images that a context-parallel rank computes: indices only, on the host.

Pieces stay whole on one rank where tokens and attention come out even, and others are cut. The
order of a piece's tokens means nothing to the encoder, whose positions are added to its patches. In
a part the patches of a row are therefore adjacent, row after row behind the class tokens: then a
cut at a multiple of a row's patches, counted from the piece's end, leaves every row whole.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mimo.kernels.cut import DocumentCut, Piece, cut_documents
from megatron_mimo.media.images import PackedImages

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagesPart(PackedImages):
    """What one context-parallel rank computes of packed images.

    `lengths` and `cu_seqlens` are those of all pieces, also of those that `cut_pieces` adds.
    Patches are this rank's, and every index counts its own tokens, t of them.

    Layers expect something to compute: a rank without rows has one that nobody reads, so that its
    gradient is zero.

    Attributes:
        ranks: Number of context-parallel ranks.
        rank: Number of this one.
        merged: Number of patches of a row, k.
        pieces: Number of pieces that are of an item.
        held_tokens: Number of this rank's tokens, t.
        most_rows: Number of rows of the rank that has most, M.
        own_rows: Numbers of this rank's rows among those of all items, int64 [r].
        gathered_rows: Where each row is among those of all ranks, each padded to M, int64 [R].
    """

    ranks: int
    rank: int
    merged: int
    pieces: int
    held_tokens: int
    most_rows: int
    own_rows: Tensor
    gathered_rows: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of this rank's tokens, t."""
        return self.held_tokens

    @property
    def cut(self) -> DocumentCut:
        """How the tokens of all pieces are cut over the ranks."""
        # Not a field: what is copied to the device has tensors and numbers alone.
        return cut_pieces(self.lengths[: self.pieces], ranks=self.ranks, merged=self.merged)


@lru_cache(maxsize=256)
def cut_pieces(lengths: tuple[int, ...], *, ranks: int, merged: int) -> DocumentCut:
    """How the tokens of packed pieces are cut over context-parallel ranks.

    A rank that they leave without tokens gets a piece of one token, which is of no item: layers
    expect something to compute.

    Args:
        lengths: Number of tokens of each piece.
        ranks: Number of context-parallel ranks.
        merged: Number of patches of a row, which stay together.
    """
    cut = cut_documents(lengths, ranks, causal=False, multiple=merged)
    empty = [rank for rank, tokens in enumerate(cut.tokens) if not tokens]
    pieces = [
        mine or (Piece(len(lengths) + empty.index(rank), 0, 1),)
        for rank, mine in enumerate(cut.pieces)
    ]
    return DocumentCut((*lengths, *(1,) * len(empty)), tuple(pieces), causal=False)


def part_of(images: PackedImages, *, rank: int, ranks: int, merged: int) -> ImagesPart:
    """Cut out what one context-parallel rank computes of packed images.

    Args:
        images: All images and videos of a replica in a microbatch, on the host.
        rank: Number of the context-parallel rank.
        ranks: Number of context-parallel ranks.
        merged: Number of patches of a row, k.
    """
    cut = cut_pieces(images.lengths, ranks=ranks, merged=merged)
    order = _order(images)
    rows = [_tokens(cut, order, each).rows(order, merged) for each in range(ranks)]
    most_rows = max(map(len, rows))
    gathered = np.empty(sum(map(len, rows)), dtype=np.int64)
    for each, of_rank in enumerate(rows):
        gathered[of_rank] = each * most_rows + np.arange(len(of_rank))
    tokens = _tokens(cut, order, rank)
    patches = order.patches[tokens.entries]
    # Patches of images are embedded before those of videos.
    num_images = len(images.patches)
    by_kind = np.argsort(patches >= num_images, kind="stable")
    numbers, slots = torch.from_numpy(patches[by_kind]), tokens.patch_slots[by_kind]
    own_images = int((patches < num_images).sum())
    of_images, of_videos = numbers[:own_images], numbers[own_images:]
    groups = images.groups
    return ImagesPart(
        patches=images.patches[of_images],
        groups=None if groups is None else groups[of_videos - num_images],
        lengths=cut.lengths,
        cu_seqlens=torch.from_numpy(np.cumsum((0, *cut.lengths), dtype=np.int32)),
        patch_slots=torch.from_numpy(slots),
        class_slots=torch.from_numpy(tokens.class_slots),
        class_index=torch.from_numpy(tokens.class_index),
        row_index=torch.from_numpy(
            tokens.patch_slots if len(rows[rank]) else np.zeros(merged, dtype=np.int64)
        ),
        position_index=images.position_index[numbers],
        position_weight=images.position_weight[numbers],
        ranks=ranks,
        rank=rank,
        merged=merged,
        pieces=len(images.lengths),
        held_tokens=cut.tokens[rank],
        most_rows=most_rows,
        own_rows=torch.from_numpy(rows[rank]),
        gathered_rows=torch.from_numpy(gathered),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Order:
    """Patches of all pieces in the order of parts: piece after piece, in each row after row.

    Attributes:
        patches: Number of each patch in `PackedImages`, [T].
        entries: Index in `PackedImages.row_index` of each patch, [T].
        starts: First patch of each piece, [N].
        extra: Number of class tokens of a piece, c.
    """

    patches: Indices
    entries: Indices
    starts: Indices
    extra: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokens:
    """Tokens of one rank, in its order.

    Attributes:
        patch_slots: Indices of the patches among them, ascending.
        entries: Place of each of these patches in `_Order`.
        class_slots: Indices of the class tokens among them, ascending.
        class_index: Number of each class token within its piece.
    """

    patch_slots: Indices
    entries: Indices
    class_slots: Indices
    class_index: Indices

    def rows(self, order: _Order, merged: int) -> Indices:
        """Numbers of the rank's rows among those of all items."""
        firsts = order.entries[self.entries[::merged]]
        assert not (firsts % merged).any(), "a row is cut"
        return firsts // merged


def _order(images: PackedImages) -> _Order:
    lengths = np.array(images.lengths, dtype=np.int64)
    slots = images.row_index.numpy()
    assert len(slots) == len(images.patch_slots), "patches that are part of no row"
    piece = np.searchsorted(np.cumsum(lengths), slots, side="right")
    entries = np.argsort(piece, kind="stable")
    patch_at = np.empty(lengths.sum(), dtype=np.int64)
    patch_at[images.patch_slots.numpy()] = np.arange(len(slots))
    counts = np.bincount(piece, minlength=len(lengths))
    return _Order(
        patches=patch_at[slots[entries]],
        entries=entries,
        starts=np.cumsum(counts) - counts,
        extra=len(images.class_slots) // len(lengths),
    )


def _tokens(cut: DocumentCut, order: _Order, rank: int) -> _Tokens:
    pieces = np.array([piece for piece in cut.pieces[rank] if piece.document < len(order.starts)])
    pieces = pieces.reshape(-1, 3).astype(np.int64)
    sizes = pieces[:, 2] - pieces[:, 1]
    piece = np.repeat(pieces[:, 0], sizes)
    place = np.arange(len(piece)) + np.repeat(pieces[:, 1] - (np.cumsum(sizes) - sizes), sizes)
    place -= order.extra
    is_patch = place >= 0
    return _Tokens(
        patch_slots=np.flatnonzero(is_patch),
        entries=(order.starts[piece] + place)[is_patch],
        class_slots=np.flatnonzero(~is_patch),
        class_index=(place + order.extra)[~is_patch],
    )
