import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.modules.language.merge import (
    join_rows,
    merge_rows,
    positions_in,
    row_positions,
)
from megatron_mimo.topology import SequenceSharding

IMAGE = 9
SOUND = 8
PLACEHOLDERS = {"audio": SOUND, "vision": IMAGE}


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


def test_rows_of_each_source_stand_at_its_own_tokens() -> None:
    input_ids = torch.tensor([[SOUND, IMAGE, 1, IMAGE, SOUND]])
    inputs = {"vision": torch.tensor([[1.0], [2.0]]), "audio": torch.tensor([[3.0], [4.0]])}
    places = {name: row_positions(input_ids, t) for name, t in PLACEHOLDERS.items()}
    rows, positions = join_rows(inputs, places)
    assert rows is not None and positions is not None
    merged = merge_rows(torch.zeros(5, 1, 1), rows, positions)
    assert merged.flatten().tolist() == [3.0, 1.0, 0.0, 2.0, 4.0]


def test_rows_of_a_source_that_miss_are_named() -> None:
    # In sum they are as many as the tokens.
    inputs = {"vision": torch.zeros(2, 1), "audio": torch.zeros(1, 1)}
    ids = torch.tensor([[SOUND, IMAGE, SOUND]])
    places = {name: row_positions(ids, token) for name, token in PLACEHOLDERS.items()}
    with pytest.raises(ValueError, match="2 rows of vision for 1 of its tokens"):
        join_rows(inputs, places)


def test_missing_rows_are_an_error() -> None:
    positions = row_positions(torch.tensor([[IMAGE, IMAGE]]), IMAGE)
    with pytest.raises(ValueError, match="1 rows of all sources for 2 of its tokens"):
        merge_rows(torch.zeros(2, 1, 4), torch.zeros(1, 4), positions)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.data())
def test_shards_put_together_are_the_whole(
    cp: int, tp: int, batch: int, sequence_parallel: bool, data: st.DataObject
) -> None:
    """Each shard merges its own rows into its own positions, in the order of the whole."""
    sharding = SequenceSharding(
        seq_length=2 * cp * tp * 2, cp=cp, tp=tp, sequence_parallel=sequence_parallel
    )
    length = sharding.seq_length
    tokens = st.lists(st.sampled_from([1, IMAGE]), min_size=length, max_size=length)
    input_ids = torch.tensor([data.draw(tokens) for _ in range(batch)])
    # Rows are named by their place in the manifest's order: sequence by sequence.
    is_image = input_ids == IMAGE
    names = torch.full_like(input_ids, -1)
    names[is_image] = torch.arange(int(is_image.sum()))
    for shard in range(sharding.num_shards):
        held = positions_in(sharding.of().intervals(shard))
        mine = names[:, held]
        rows = mine[mine >= 0].float().unsqueeze(1)
        merged = merge_rows(
            torch.full((len(held), batch, 1), -1.0), rows, row_positions(input_ids, IMAGE, held)
        )
        assert torch.equal(merged[:, :, 0].T, mine.float())


def test_no_rows_in_this_shard_stay_in_the_graph() -> None:
    """Else a frozen model's collectives would run backward on some ranks and not on others."""
    rows = torch.zeros(0, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    merged = merge_rows(torch.zeros(2, 1, 4), rows, none)
    merged.sum().backward()
    assert rows.grad is not None and rows.grad.shape == (0, 4)
