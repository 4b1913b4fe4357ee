"""Which ranks of a layout stand for each other in a dry run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.tools.plan.dry_run.roles import distinct_roles
from megatron_mimo.topology import Layout, ModuleGridSpec
from tests.properties import examples


def layout(encoder: dict[str, int], llm: dict[str, int]) -> Layout:
    grids = [ModuleGridSpec(name="encoder", **encoder), ModuleGridSpec(name="llm", **llm)]
    return Layout.of(*grids, world_size=max(grid.ranks.stop for grid in grids))


@pytest.mark.parametrize(
    ("encoder", "llm", "roles"),
    [
        (
            {"dp": 8},
            {"offset": 8, "tp": 2, "dp": 128, "ep": 8},
            ["encoder (rank 0, as 8 ranks)", "llm (rank 8, as 256 ranks)"],
        ),
        ({"dp": 4}, {"tp": 2, "dp": 2}, ["encoder and llm (rank 0, as 4 ranks)"]),
        (
            {"dp": 2},
            {"offset": 2, "dp": 3},
            [
                "encoder, serving 2 (rank 0)",
                "encoder, serving 1 (rank 1)",
                "llm (rank 2, as 3 ranks)",
            ],
        ),
        (
            {"dp": 3},
            {"offset": 3, "pp": 2, "cp": 2, "dp": 2},
            [
                "encoder (rank 0, as 3 ranks)",
                "llm stage 0 of 2, cp 0, served by 2 (rank 3)",
                "llm stage 0 of 2, cp 1, served by 2 (rank 4)",
                "llm stage 0 of 2, cp 0, served by 1 (rank 5)",
                "llm stage 0 of 2, cp 1, served by 1 (rank 6)",
                "llm stage 1 of 2, cp 0 (rank 7, as 2 ranks)",
                "llm stage 1 of 2, cp 1 (rank 8, as 2 ranks)",
            ],
        ),
    ],
    ids=["production", "colocated", "uneven lanes", "stages and parts of a sequence"],
)
def test_roles_of_a_layout(encoder: dict[str, int], llm: dict[str, int], roles: list[str]) -> None:
    assert [str(role) for role in distinct_roles(layout(encoder, llm))] == roles


sizes = st.integers(1, 3)


@given(sizes, sizes, sizes, sizes, sizes, st.integers(0, 12))
@examples(100)
def test_every_rank_has_one_role_and_holds_what_its_role_does(
    encoder_dp: int, encoder_pp: int, tp: int, pp: int, dp: int, offset: int
) -> None:
    offset = min(offset, encoder_dp * encoder_pp)
    chosen = layout(
        {"dp": encoder_dp, "pp": encoder_pp}, {"offset": offset, "tp": tp, "pp": pp, "dp": dp}
    )
    roles = distinct_roles(chosen)
    ranks = [rank for role in roles for rank in role.ranks]
    assert sorted(ranks) == list(range(chosen.world_size))
    for role in roles:
        assert {chosen.stages_of(rank) for rank in role.ranks} == {chosen.stages_of(role.rank)}
    assert len({str(role) for role in roles}) == len(roles)
