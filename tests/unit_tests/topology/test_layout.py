import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.topology import Layout, ModuleGridSpec, assign_images


def disjoint(encoder_dp: int, llm_dp: int, encoder_tp: int = 1, llm_tp: int = 1) -> Layout:
    encoder = ModuleGridSpec(name="encoder", dp=encoder_dp, tp=encoder_tp)
    llm = ModuleGridSpec(name="llm", dp=llm_dp, tp=llm_tp, offset=encoder.size)
    return Layout(encoder=encoder, llm=llm, world_size=encoder.size + llm.size)


@given(st.integers(1, 12), st.integers(1, 12))
def test_every_lane_is_served_and_every_encoder_rank_serves(encoder_dp: int, llm_dp: int) -> None:
    layout = disjoint(encoder_dp, llm_dp)
    for lane in range(llm_dp):
        assert layout.serving(lane)
        for encoder_rank in layout.serving(lane):
            assert lane in layout.served(encoder_rank)
    assert all(layout.served(encoder_rank) for encoder_rank in range(encoder_dp))


@given(st.integers(1, 12), st.integers(1, 12))
def test_service_is_as_even_as_it_can_be(encoder_dp: int, llm_dp: int) -> None:
    layout = disjoint(encoder_dp, llm_dp)
    lanes = [len(layout.served(encoder_rank)) for encoder_rank in range(encoder_dp)]
    helpers = [len(layout.serving(lane)) for lane in range(llm_dp)]
    assert max(lanes) - min(lanes) <= 1
    assert max(helpers) - min(helpers) <= 1


@given(st.integers(0, 20), st.integers(1, 6), st.integers(0, 10))
def test_images_spread_evenly_over_the_serving_ranks(images: int, ranks: int, m: int) -> None:
    serving = tuple(range(10, 10 + ranks))
    assigned = assign_images(images, serving, m)
    counts = [assigned.count(rank) for rank in serving]
    assert sum(counts) == images
    assert max(counts) - min(counts) <= 1


def test_single_images_rotate_over_the_serving_ranks() -> None:
    assert [assign_images(1, (0, 1), m) for m in range(4)] == [(0,), (1,), (0,), (1,)]


def test_colocated_grids_share_every_rank() -> None:
    layout = Layout(
        encoder=ModuleGridSpec(name="encoder", dp=4),
        llm=ModuleGridSpec(name="llm", tp=2, dp=2),
        world_size=4,
    )
    assert layout.colocated
    assert layout.describe_rank(3) == "encoder dp 3, llm dp 1 tp 1"


@pytest.mark.parametrize(
    ("encoder", "llm", "world_size", "message"),
    [
        (
            {"dp": 4},
            {"offset": 4, "dp": 8},
            16,
            "encoder grid [0, 4) and llm grid [4, 12) leave ranks [12, 16) unused: start 12 ranks",
        ),
        ({"dp": 4}, {"offset": 2, "dp": 4}, 6, "overlap on ranks [2, 4)"),
        ({"dp": 2}, {"offset": 2, "dp": 4}, 4, "llm grid [2, 6) needs ranks up to 5, but only 4"),
        ({"dp": 1}, {"offset": 2, "dp": 2}, 4, "leave ranks [1, 2) unused"),
        (None, {"dp": 2}, 4, "llm grid [0, 2) leaves ranks [2, 4) unused"),
    ],
)
def test_wrong_layouts_name_the_ranks(
    encoder: dict[str, int] | None, llm: dict[str, int], world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Layout(
            encoder=None if encoder is None else ModuleGridSpec(name="encoder", **encoder),
            llm=ModuleGridSpec(name="llm", **llm),
            world_size=world_size,
        )


def test_the_table_shows_grids_and_service() -> None:
    table = disjoint(2, 4, llm_tp=2).table()
    assert "10 ranks, disjoint grids" in table
    assert re.search(r"llm\s+\[2, 10\)\s+2\s+1\s+1\s+4", table)
    assert "encoder dp 1 serves llm lanes 2, 3" in table
