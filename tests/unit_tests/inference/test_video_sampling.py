"""Efficient video sampling keeps the rows that transformers keeps."""

import pytest
import torch

from megatron_mimo.inference.video_sampling import retained


@pytest.mark.parametrize(("groups", "side"), [(1, 2), (2, 3), (5, 2), (7, 4)])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.9, 0.99])
def test_the_rows_that_are_kept_are_those_of_transformers(
    groups: int, side: int, rate: float
) -> None:
    from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import compute_retention_mask

    random = torch.Generator().manual_seed(groups * side)
    rows = torch.randn(groups, side**2, 8, generator=random)
    # Some do not change at all.
    rows[groups // 2, 0] = rows[max(0, groups // 2 - 1), 0]
    wanted = compute_retention_mask(
        video_embeds=rows,
        thw=torch.tensor([groups, side, side]),
        spatial_merge_size=1,
        q=rate,
    )
    assert retained(rows, rate).flatten().equal(wanted)
