"""Put the encoder's rows where the image tokens stand."""

import torch
from torch import Tensor


def row_positions(input_ids: Tensor, image_token_id: int) -> Tensor:
    """Where rows go in the flattened sequence; computed on the host, ahead of the forward.

    Args:
        input_ids: int64 [B, S].
        image_token_id: Token that rows replace.

    Returns:
        int64 [R], positions in [S * B] of the image tokens, sample by sample.
    """
    sample, position = torch.nonzero(input_ids == image_token_id, as_tuple=True)
    return position * input_ids.shape[0] + sample


def merge_rows(embeddings: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Replace the embeddings of image tokens with rows, in order.

    Args:
        embeddings: [S, B, H], text embeddings of the whole sequence.
        rows: [R, H], same dtype.
        positions: int64 [R], from `row_positions`.

    Returns:
        [S, B, H].

    Raises:
        ValueError: The number of rows and of image tokens differ.
    """
    if rows.shape[0] != positions.shape[0]:
        raise ValueError(
            f"{rows.shape[0]} rows for {positions.shape[0]} image tokens: the manifest and the "
            f"tokens of this microbatch disagree"
        )
    return embeddings.flatten(0, 1).index_copy(0, positions, rows).view_as(embeddings)
