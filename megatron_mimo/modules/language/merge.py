"""Replace the embeddings of placeholder tokens with the rows of sources."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def positions_in(intervals: Iterable[tuple[int, int]]) -> Tensor:
    """The positions in half-open intervals, interval after interval, int64 [N]."""
    return torch.cat([torch.arange(start, stop) for start, stop in intervals])


def row_positions(input_ids: Tensor, token_id: int, shard: Tensor | None = None) -> Tensor:
    """Positions of rows in a shard of the flattened sequence; computed on the host, ahead.

    Args:
        input_ids: Tokens of the whole sequences, int64 [B, S].
        token_id: Number of the token that rows replace.
        shard: Ascending positions that this rank holds, int64 [s]; None for all.

    Returns:
        Positions in [s * B] of the shard's placeholder tokens, sample by sample, int64 [R].
    """
    held = input_ids if shard is None else input_ids[:, shard]
    sample, position = torch.nonzero(held == token_id, as_tuple=True)
    return position * held.shape[0] + sample


def join_rows(
    rows: Mapping[str, Tensor], positions: Mapping[str, Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """The concatenated rows of all sources, and their positions; None for no source.

    With several sources the merge is still one pass: positions differ, so that the order of the
    sources does not matter.

    Args:
        rows: Source name -> its rows [R, H].
        positions: Source name -> positions of its rows from `row_positions`, int64 [R], on the
            device of the rows; of other sources too.

    Returns:
        Rows [R, H] of all sources, and their positions in [s * B], int64 [R].

    Raises:
        ValueError: The number of rows of a source differs from that of its tokens.
    """
    if not rows:
        return None, None
    for source, of_source in rows.items():
        _require_as_many(source, of_source, positions[source])
    parts, places = list(rows.values()), [positions[source] for source in rows]
    if len(parts) == 1:  # Without the copy that joining makes.
        return parts[0], places[0]
    return torch.cat(parts), torch.cat(places)


def merge_rows(embeddings: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Replace the embeddings of placeholder tokens with rows.

    Args:
        embeddings: Text embeddings of this rank's shard of the sequence, [s, B, H].
        rows: Rows [R, H] in the dtype of the embeddings.
        positions: Positions from `row_positions`, int64 [R].

    Returns:
        Embeddings [s, B, H] with the rows, in the same dtype.

    Raises:
        ValueError: The number of rows and of positions differ.
    """
    _require_as_many("all sources", rows, positions)
    return embeddings.flatten(0, 1).index_copy(0, positions, rows).view_as(embeddings)


def _require_as_many(source: str, rows: Tensor, positions: Tensor) -> None:
    if rows.shape[0] != positions.shape[0]:
        raise ValueError(
            f"{rows.shape[0]} rows of {source} for {positions.shape[0]} of its tokens: the "
            f"manifest and the tokens of this microbatch disagree"
        )
