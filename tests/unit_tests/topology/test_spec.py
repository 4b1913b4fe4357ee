import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.topology import AXES, ModuleGridSpec

sizes = st.integers(1, 4)


@st.composite
def grids(draw: st.DrawFn) -> ModuleGridSpec:
    tp, cp, dp, pp = (draw(sizes) for _ in range(4))
    blocks = [(e, t) for e in range(1, 9) for t in range(1, 5) if (tp * cp * dp) % (e * t) == 0]
    ep, expt_tp = draw(st.sampled_from(blocks))
    offset = draw(st.integers(0, 20))
    return ModuleGridSpec(
        name="llm", offset=offset, tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, expt_tp=expt_tp
    )


@given(grids())
def test_rank_is_the_inverse_of_coordinates(grid: ModuleGridSpec) -> None:
    for rank in grid.ranks:
        place = grid.coordinates(rank)
        assert grid.rank(tp=place.tp, cp=place.cp, dp=place.dp, pp=place.pp) == rank


@given(grids(), st.sets(st.sampled_from(AXES), min_size=1))
def test_groups_cut_the_grid_into_equal_parts(grid: ModuleGridSpec, axes: set[str]) -> None:
    groups = list(grid.groups(*axes))
    assert sorted(rank for group in groups for rank in group) == list(grid.ranks)
    size = 1
    for axis in axes:
        size *= getattr(grid, axis)
    assert {len(group) for group in groups} == {size}


def test_tensor_parallel_ranks_are_neighbours() -> None:
    grid = ModuleGridSpec(name="llm", offset=8, tp=2, dp=2, pp=2)
    assert list(grid.groups("tp")) == [(8, 9), (10, 11), (12, 13), (14, 15)]
    assert list(grid.groups("dp")) == [(8, 10), (9, 11), (12, 14), (13, 15)]
    assert list(grid.groups("pp")) == [(8, 12), (9, 13), (10, 14), (11, 15)]


def test_expert_view_covers_the_same_stage() -> None:
    grid = ModuleGridSpec(name="llm", tp=2, dp=4, ep=4, expt_tp=1)
    assert grid.expt_dp == 2
    assert [grid.coordinates(rank).ep for rank in grid.ranks] == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 0}, "--llm-tp is 0: expected 1 to 1,000,000"),
        ({"offset": -1}, "--llm-offset is -1"),
        ({"tp": 2, "ep": 3}, "--llm-expt-tp 1 x --llm-ep 3 does not divide the 2 ranks"),
    ],
)
def test_impossible_sizes_name_their_flag(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ModuleGridSpec(name="llm", **sizes)


def test_a_rank_outside_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 3 is not in the llm grid \[4, 6\)"):
        ModuleGridSpec(name="llm", offset=4, dp=2).coordinates(3)
