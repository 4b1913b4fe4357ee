import pytest
import torch

from megatron_mimo.model.merge import merge_rows, row_positions

IMAGE = 9


def test_rows_land_sample_by_sample_in_order() -> None:
    input_ids = torch.tensor([[IMAGE, 1, IMAGE], [2, IMAGE, 3]])  # [B=2, S=3]
    embeddings = torch.zeros(3, 2, 1)  # [S, B, H]
    rows = torch.tensor([[1.0], [2.0], [3.0]])
    merged = merge_rows(embeddings, rows, row_positions(input_ids, IMAGE))
    assert merged[:, 0, 0].tolist() == [1.0, 0.0, 2.0]
    assert merged[:, 1, 0].tolist() == [0.0, 3.0, 0.0]


def test_gradients_split_between_text_and_rows() -> None:
    input_ids = torch.tensor([[IMAGE, 1]])
    embeddings = torch.randn(2, 1, 4, requires_grad=True)
    rows = torch.randn(1, 4, requires_grad=True)
    weight = torch.randn(2, 1, 4)
    (merge_rows(embeddings, rows, row_positions(input_ids, IMAGE)) * weight).sum().backward()
    assert rows.grad is not None and embeddings.grad is not None
    assert torch.equal(rows.grad, weight[0])
    assert torch.equal(embeddings.grad[0], torch.zeros(1, 4))
    assert torch.equal(embeddings.grad[1], weight[1])


def test_missing_rows_are_an_error() -> None:
    positions = row_positions(torch.tensor([[IMAGE, IMAGE]]), IMAGE)
    with pytest.raises(ValueError, match="1 rows for 2 image tokens"):
        merge_rows(torch.zeros(2, 1, 4), torch.zeros(1, 4), positions)
