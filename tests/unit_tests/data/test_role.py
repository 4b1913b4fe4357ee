"""What each rank reads, on layouts of one, two and three modules."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.role import SourceRole, data_role
from megatron_mimo.topology import Layout, ModuleGridSpec


def layout(encoder: int, audio: int, llm: int, *, apart: bool = True, **target: int) -> Layout:
    first = ModuleGridSpec(name="encoder", dp=encoder)
    second = ModuleGridSpec(name="audio", dp=audio, offset=encoder if apart else 0)
    behind = encoder + audio if apart else 0
    third = ModuleGridSpec(name="llm", dp=llm, offset=behind, **target)
    size = max(grid.ranks.stop for grid in (first, second, third))
    return Layout.of(first, second, third, world_size=size)


def test_a_rank_of_one_module_reads_the_lanes_that_it_serves() -> None:
    of = layout(2, 1, 4)
    encoder, audio, target = (data_role(of, rank) for rank in (1, 2, 4))
    assert (encoder.lanes, encoder.text_lane, encoder.runs) == ((2, 3), None, ("encoder",))
    assert encoder.sources == {
        "encoder": SourceRole(rank=1, serving={2: (1,), 3: (1,)}),
        "audio": SourceRole(rank=None, serving={2: (0,), 3: (0,)}),
    }
    assert (audio.lanes, audio.text_lane, audio.runs) == ((0, 1, 2, 3), None, ("audio",))
    assert (target.lanes, target.text_lane, target.runs) == ((1,), 1, ())
    assert {name: role.serving for name, role in target.sources.items()} == {
        "encoder": {1: (0,)},
        "audio": {1: (0,)},
    }


def test_a_rank_of_all_modules_reads_the_lanes_of_each() -> None:
    of = layout(1, 3, 3, apart=False)
    assert data_role(of, 0).lanes == (0, 1, 2)
    assert data_role(of, 0).runs == ("encoder", "audio")
    assert (data_role(of, 2).lanes, data_role(of, 2).runs) == ((2,), ("audio",))


def test_a_language_model_alone_has_no_sources() -> None:
    of = Layout.of(ModuleGridSpec(name="llm", dp=2, tp=2), world_size=4)
    role = data_role(of, 3)
    assert (role.lanes, role.num_lanes, role.text_lane, role.sources) == ((1,), 2, 1, {})


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_ranks_agree_on_who_serves_their_lanes(
    encoder: int, audio: int, llm: int, apart: bool
) -> None:
    of = layout(encoder, audio, llm, apart=apart)
    roles = [data_role(of, rank) for rank in range(of.world_size)]
    for lane in range(llm):
        readers = [role for role in roles if lane in role.lanes]
        for module in ("encoder", "audio"):
            serving = {role.sources[module].serving[lane] for role in readers}
            assert serving == {of.serving(module, lane)}
            here = {role.sources[module].rank for role in readers} - {None}
            assert here >= set(of.serving(module, lane))
        assert sum(role.text_lane == lane for role in readers) == 1
