"""Put the encoder's rows where the image tokens stand."""

from collections.abc import Iterable

import torch
from torch import Tensor


def positions_in(intervals: Iterable[tuple[int, int]]) -> Tensor:
    """The positions of half-open intervals laid end to end, int64."""
    return torch.cat([torch.arange(start, stop) for start, stop in intervals])


def row_positions(input_ids: Tensor, image_token_id: int, shard: Tensor | None = None) -> Tensor:
    """Where rows go in a shard of the flattened sequence; computed on the host, ahead.

    Args:
        input_ids: int64 [B, S], the whole sequences.
        image_token_id: Token that rows replace.
        shard: int64 [s], ascending positions that this rank holds; None for all.

    Returns:
        int64 [R], positions in [s * B] of the shard's image tokens, sample by sample.
    """
    held = input_ids if shard is None else input_ids[:, shard]
    sample, position = torch.nonzero(held == image_token_id, as_tuple=True)
    return position * held.shape[0] + sample


def merge_rows(embeddings: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Replace the embeddings of image tokens with rows, in order.

    Args:
        embeddings: [s, B, H], text embeddings of this rank's shard of the sequence.
        rows: [R, H], same dtype.
        positions: int64 [R], from `row_positions`.

    Returns:
        [s, B, H].

    Raises:
        ValueError: The number of rows and of image tokens differ.
    """
    if rows.shape[0] != positions.shape[0]:
        raise ValueError(
            f"{rows.shape[0]} rows for {positions.shape[0]} image tokens: the manifest and the "
            f"tokens of this microbatch disagree"
        )
    return embeddings.flatten(0, 1).index_copy(0, positions, rows).view_as(embeddings)
