"""Efficient video sampling: rows of a video that hardly differ from the frames before are left out.

A model that was trained with every row answers from fewer of them. The rule is that of
https://arxiv.org/abs/2510.14624, as transformers' Nemotron H Omni model applies it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def retained(rows: Tensor, rate: float) -> Tensor:
    """Which rows of a video are kept.

    All rows of the first group of frames are, and of the others those that differ most from the row
    at the same place of the group before.

    Args:
        rows: Rows of the language model's width, [G, n, H]: n of each of the G groups of frames.
        rate: Fraction of the rows that is left out, 0 to 1; a whole group is always kept.

    Returns:
        Whether each row is kept, bool [G, n].
    """
    groups, number, _ = rows.shape
    kept = max(number, int(groups * number * (1 - rate)))
    change = 1 - F.cosine_similarity(rows[1:], rows[:-1], dim=-1)
    # Above any change, which is 2 at most.
    first = torch.full_like(rows[:1, :, 0], 255.0)
    change = torch.cat([first, change]).flatten()
    order = change.argsort(descending=True, stable=True)
    mask = torch.zeros_like(change, dtype=torch.bool)
    mask[order[:kept]] = True
    return mask.view(groups, number)
