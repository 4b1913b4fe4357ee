"""The parts of context-parallel ranks: together they are the whole, and each is its fair share."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.media.images import PackedImages
from megatron_mimo.media.images.config import ImageConfig
from megatron_mimo.media.images.packing import pack_patches
from megatron_mimo.modules.radio.part import ImagesPart, part_of
from tests.properties import examples

MERGED = 4
PIECES = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), min_size=1, max_size=12
)


def packed_of(
    pieces: list[tuple[int, int, bool]],
    *,
    extra: int,
    order: Any = "nemotron",
    shuffle: bool = True,
) -> PackedImages:
    """Pieces of twice as many patches each way; the pixels of a patch are its number."""
    config = ImageConfig(
        patch_dim=1,
        class_token_len=extra,
        position_grid=8,
        row_order=order,
        pixel_shuffle=shuffle,
        pixel_mean=(0, 0, 0),
        pixel_std=(1, 1, 1),
    )
    grids = [(2 * rows, 2 * columns) for rows, columns, _ in pieces]
    of_video = [video for _, _, video in pieces]
    counts = [rows * columns for rows, columns in grids]
    numbers = torch.arange(sum(counts), dtype=torch.float32)
    images, videos = (
        sum(count for count, video in zip(counts, of_video, strict=True) if video is kind)
        for kind in (False, True)
    )
    draws = np.random.default_rng(3).random((len(grids), 4))
    return pack_patches(
        numbers[:images, None].repeat(1, 3),
        grids,
        config,
        draws,
        groups=numbers[images:, None].repeat(1, 6) if videos else None,
        of_video=of_video,
    )


def tokens_of(images: PackedImages) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of the patch at each token, or -1 - number of the class token; and its position."""
    of_patches = [images.patches[:, 0]]
    if images.groups is not None:
        of_patches.append(images.groups[:, 0])
    tokens = torch.full((images.num_tokens,), torch.nan)
    tokens[images.patch_slots] = torch.cat(of_patches)
    extra = len(images.class_slots) // len(images.lengths)
    index = images.class_index
    if index is None:
        index = torch.arange(extra).repeat(len(images.lengths))
    tokens[images.class_slots] = -1.0 - index
    cells = (images.position_index * images.position_weight).sum(1)
    positions = torch.full((images.num_tokens,), -1.0)
    positions[images.patch_slots] = cells
    return tokens, positions


def parts_of(images: PackedImages, ranks: int, merged: int) -> list[ImagesPart]:
    return [part_of(images, rank=rank, ranks=ranks, merged=merged) for rank in range(ranks)]


@examples(300)
@given(
    PIECES,
    st.integers(0, 11),
    st.integers(2, 5),
    st.sampled_from([("nemotron", True), ("megatron", True), ("nemotron", False)]),
)
def test_parts_are_the_whole_together(
    pieces: list[tuple[int, int, bool]], extra: int, ranks: int, rows: tuple[str, bool]
) -> None:
    order, shuffle = rows
    merged = MERGED if shuffle else 1
    whole = packed_of(pieces, extra=extra, order=order, shuffle=shuffle)
    wanted, positions = tokens_of(whole)
    starts = np.cumsum(whole.lengths) - whole.lengths
    padded = []
    seen: list[tuple[int, float, float]] = []
    for part in parts_of(whole, ranks, merged):
        assert part.lengths == part.cut.lengths and part.lengths[: len(starts)] == whole.lengths
        assert part.cu_seqlens.tolist() == [0, *np.cumsum(part.lengths)]
        tokens, places = tokens_of(part)
        mine = [piece for piece in part.cut.pieces[part.rank] if piece.document < len(starts)]
        document = [d for d, a, b in mine for _ in range(b - a)]
        assert tokens.isnan().sum() == (not document)
        # A rank without a token of an item has one of none.
        assert len(tokens) == max(len(document), 1)
        seen += zip(document, tokens.tolist(), places.tolist(), strict=bool(document))
        rows_of_tokens = tokens[part.row_index].view(-1, merged)[: len(part.own_rows)]
        assert len(part.row_index) == max(len(part.own_rows), 1) * merged
        padded.append(torch.full((part.most_rows, merged), torch.nan))
        padded[-1][: len(part.own_rows)] = rows_of_tokens
        # What backward gives to this rank is the gradient of its own rows.
        assert wanted[whole.row_index].view(-1, merged)[part.own_rows].equal(rows_of_tokens)
    assert torch.cat(padded)[part.gathered_rows].equal(wanted[whole.row_index].view(-1, merged))
    # Each piece has its own patches, at their positions, and its own class tokens.
    document = np.repeat(np.arange(len(starts)), whole.lengths)
    pairs = zip(document.tolist(), wanted.tolist(), positions.tolist(), strict=True)
    assert sorted(seen) == sorted(pairs)


@examples(200)
@given(PIECES, st.integers(0, 11), st.integers(2, 4))
def test_no_rank_has_much_more_than_its_share(
    pieces: list[tuple[int, int, bool]], extra: int, ranks: int
) -> None:
    whole = packed_of(pieces, extra=extra)
    tokens = [part.num_tokens for part in parts_of(whole, ranks, MERGED)]
    # Beyond a row, a piece's class tokens that are no whole row stay with its first ones.
    assert max(tokens) - min(tokens) <= MERGED + len(pieces) * (extra % MERGED)


def test_an_item_smaller_than_the_ranks_leaves_some_without_tokens() -> None:
    parts = parts_of(packed_of([(1, 1, False)], extra=0), 3, MERGED)
    # Layers have a token to compute, which is of no item and part of no row.
    assert all(part.lengths == (4, 1, 1) for part in parts)
    assert sorted(part.num_tokens for part in parts) == [1, 1, 4]
    assert sorted(len(part.own_rows) for part in parts) == [0, 0, 1]
    assert all(len(part.gathered_rows) == 1 for part in parts)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_order_of_tokens_does_not_depend_on_the_ranks(ranks: int) -> None:
    whole = packed_of([(3, 4, False), (6, 6, False)], extra=3)
    (alone,) = parts_of(whole, 1, MERGED)
    together = sorted(
        (document, start, token)
        for part in parts_of(whole, ranks, MERGED)
        for (document, first, end) in part.cut.pieces[part.rank]
        for start, token in zip(range(first, end), _piece(part, document, first), strict=False)
    )
    assert [token for *_, token in together] == tokens_of(alone)[0].tolist()


def _piece(part: ImagesPart, document: int, first: int) -> list[float]:
    """Tokens of a part from the beginning of one of its pieces on."""
    offset = 0
    for number, start, stop in part.cut.pieces[part.rank]:
        if (number, start) == (document, first):
            return tokens_of(part)[0][offset:].tolist()
        offset += stop - start
    raise AssertionError((document, first))
