"""Rows that cross the bridge, and the encoder's output as models of transformers take it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def rows_of(output: Any) -> Tensor:
    """The rows of an encoder's output.

    Args:
        output: Result of a model's `get_image_features`: features of each image in `pooler_output`,
            and in `deepstack_features`, where there are any, those for further layers.

    Returns:
        Rows [R, parts * H]: the features side by side.
    """
    parts = [_joined(output.pooler_output)]
    parts += [_joined(features) for features in getattr(output, "deepstack_features", None) or ()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def in_order(rows: Tensor, counts: Sequence[int], places: Sequence[int]) -> Tensor:
    """Rows [R, width] in the order of the manifest.

    Args:
        rows: Rows [R, width] of all images, in the order in which the encoder took them.
        counts: Number of rows of each image of the manifest.
        places: Index among the encoder's images of each image of the manifest.
    """
    if list(places) == sorted(places):
        return rows
    taken = [0] * len(counts)
    for count, place in zip(counts, places, strict=True):
        taken[place] = count
    pieces = rows.split(taken)
    return torch.cat([pieces[place] for place in places])


def features_of(rows: Tensor, parts: int) -> Any:
    """The reverse of `rows_of`, for the argument `mm_encoder_outputs`.

    Args:
        rows: Rows [R, parts * H] of all images.
        parts: Number of vectors that a row consists of.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    first, *others = rows.chunk(parts, dim=-1)
    output: Any = BaseModelOutputWithPooling()
    # The model joins the images again, so that one piece does for all.
    output.pooler_output = (first,)
    output.deepstack_features = [(part,) for part in others]
    return output


def _joined(features: Any) -> Tensor:
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    pieces = list(features)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
