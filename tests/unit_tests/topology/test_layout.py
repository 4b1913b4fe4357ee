import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.topology import Domain, Edge, Layout, ModuleGridSpec, assign_items, balanced


def disjoint(encoder_dp: int, llm_dp: int, encoder_tp: int = 1, llm_tp: int = 1) -> Layout:
    encoder = ModuleGridSpec(name="encoder", dp=encoder_dp, tp=encoder_tp)
    llm = ModuleGridSpec(name="llm", dp=llm_dp, tp=llm_tp, offset=encoder.size)
    return Layout.of(encoder, llm, world_size=encoder.size + llm.size)


@given(st.integers(1, 12), st.integers(1, 12))
def test_every_lane_is_served_and_every_encoder_rank_serves(encoder_dp: int, llm_dp: int) -> None:
    layout = disjoint(encoder_dp, llm_dp)
    for lane in range(llm_dp):
        assert layout.serving("encoder", lane)
        for encoder_rank in layout.serving("encoder", lane):
            assert lane in layout.served("encoder", encoder_rank)
    assert all(layout.served("encoder", encoder_rank) for encoder_rank in range(encoder_dp))


@given(st.integers(1, 12), st.integers(1, 12))
def test_service_is_as_even_as_it_can_be(encoder_dp: int, llm_dp: int) -> None:
    layout = disjoint(encoder_dp, llm_dp)
    lanes = [len(layout.served("encoder", encoder_rank)) for encoder_rank in range(encoder_dp)]
    helpers = [len(layout.serving("encoder", lane)) for lane in range(llm_dp)]
    assert max(lanes) - min(lanes) <= 1
    assert max(helpers) - min(helpers) <= 1


@given(st.integers(0, 20), st.integers(1, 6), st.integers(0, 10))
def test_images_spread_evenly_over_the_serving_ranks(images: int, ranks: int, m: int) -> None:
    serving = tuple(range(10, 10 + ranks))
    assigned = assign_items(images, serving, m)
    counts = [assigned.count(rank) for rank in serving]
    assert sum(counts) == images
    assert max(counts) - min(counts) <= 1


def test_single_images_rotate_over_the_serving_ranks() -> None:
    assert [assign_items(1, (0, 1), m) for m in range(4)] == [(0,), (1,), (0,), (1,)]


def test_colocated_grids_share_every_rank() -> None:
    layout = Layout.of(
        ModuleGridSpec(name="encoder", dp=4),
        ModuleGridSpec(name="llm", tp=2, dp=2),
        world_size=4,
    )
    assert "colocated grids" in layout.table()
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
        ({"dp": 2}, {"offset": 2, "dp": 4}, 4, "llm grid [2, 6) needs ranks up to 5, but only 4"),
        ({"dp": 1}, {"offset": 2, "dp": 2}, 4, "leave ranks [1, 2) unused"),
        (None, {"dp": 2}, 4, "llm grid [0, 2) leaves ranks [2, 4) unused"),
    ],
)
def test_wrong_layouts_name_the_ranks(
    encoder: dict[str, int] | None, llm: dict[str, int], world_size: int, message: str
) -> None:
    grids = [] if encoder is None else [ModuleGridSpec(name="encoder", **encoder)]
    with pytest.raises(ValueError, match=re.escape(message)):
        Layout.of(*grids, ModuleGridSpec(name="llm", **llm), world_size=world_size)


def test_grids_may_overlap_in_any_way() -> None:
    layout = Layout.of(
        ModuleGridSpec(name="vision", dp=4),
        ModuleGridSpec(name="audio", dp=2, offset=3),
        ModuleGridSpec(name="llm", offset=2, dp=2, pp=2),
        world_size=6,
    )
    assert "grids that share ranks" in layout.table()
    assert layout.stages_of(3) == (("vision", 0), ("audio", 0), ("llm", 0))
    assert layout.stages_of(4) == (("audio", 0), ("llm", 1))
    assert layout.describe_rank(4) == "audio dp 1, llm dp 0 pp 1"
    assert layout.shares_ranks("vision", "audio")
    assert not Layout.of(
        ModuleGridSpec(name="vision"), ModuleGridSpec(name="llm", offset=1), world_size=2
    ).shares_ranks("vision", "llm")


VISION, AUDIO, LLM = (ModuleGridSpec(name=name) for name in ("vision", "audio", "llm"))


@pytest.mark.parametrize(
    ("grids", "edges", "message"),
    [
        ((VISION, LLM), (), "no edge between modules vision, llm: expected one module that all"),
        (
            (VISION, AUDIO, LLM),
            (Edge("vision", "audio"), Edge("audio", "llm")),
            "vision -> audio, audio -> llm between modules vision, audio, llm: expected one",
        ),
        ((VISION, LLM), (Edge("video", "llm"),), "names module 'video': expected vision, llm"),
        ((VISION, LLM), (Edge("vision", "llm"),) * 2, "expected one edge for each"),
    ],
)
def test_all_modules_feed_one(
    grids: tuple[ModuleGridSpec, ...], edges: tuple[Edge, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(modules={grid.name: grid for grid in grids}, edges=edges, world_size=1)


def test_a_name_stands_for_one_grid() -> None:
    with pytest.raises(ValueError, match="'vision' has two grids"):
        Layout.of(VISION, VISION, LLM, world_size=1)
    with pytest.raises(ValueError, match="'vision' has the grid of 'audio'"):
        Layout(modules={"vision": AUDIO}, edges=(), world_size=1)


def test_the_table_shows_grids_and_service() -> None:
    table = disjoint(2, 4, llm_tp=2).table()
    assert "10 ranks, disjoint grids" in table
    assert re.search(r"llm\s+\[2, 10\)\s+2\s+1\s+1\s+4", table)
    assert "encoder dp 1 serves llm lanes 2, 3" in table


@given(st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_who_may_run_an_item_exchanges_rows_with_its_lane(
    encoder_dp: int, llm_dp: int, by_cost: bool
) -> None:
    layout = disjoint(encoder_dp, llm_dp)
    if by_cost:
        layout = balanced(layout)
        assert bool(layout.domains) == (encoder_dp > 1)
    found = [(set(ranks), set(lanes)) for ranks, lanes in layout.neighbourhoods("encoder")]
    for lane in range(llm_dp):
        runners = layout.runners("encoder", lane)
        assert set(layout.serving("encoder", lane)) <= set(runners)
        for dp in runners:
            assert lane in layout.reached("encoder", dp)
            assert any(dp in ranks and lane in lanes for ranks, lanes in found)
    if layout.domains:
        assert found == [(set(range(encoder_dp)), set(range(llm_dp)))]


def test_domains_of_a_part_of_the_replicas() -> None:
    layout = balanced(disjoint(4, 8), 2)
    assert layout.domains == {
        "encoder": (Domain((0, 1), (0, 1, 2, 3)), Domain((2, 3), (4, 5, 6, 7)))
    }
    assert layout.runners("encoder", 5) == (2, 3)
    assert layout.reached("encoder", 1) == (0, 1, 2, 3)
    assert "items of encoder are shared out by their cost among groups of 2 dp ranks" in (
        layout.table()
    )
    with pytest.raises(ValueError, match="encoder dp ranks 0 to 3 serve lane 0 together, and"):
        balanced(disjoint(4, 1), 2)
