"""Both grids must read the same samples; disagreement is found before any row moves."""

from collections.abc import Callable, Mapping

from megatron_mimo.topology import Layout, ModuleGridSpec

LAYOUT = Layout(
    encoder=ModuleGridSpec(name="encoder"),
    llm=ModuleGridSpec(name="llm", offset=1, dp=2),
    world_size=3,
)


def agree(digests: Mapping[int, Mapping[int, int]], tokens: int, validate: bool) -> int | str:
    """Run the agreement with each rank's digests by lane; the error's text if it fails."""
    import torch.distributed as dist

    from megatron_mimo.data.batch import StepData
    from megatron_mimo.training.agreement import agree_on_step

    mine = dict(digests[dist.get_rank()])
    step = StepData(
        microbatches=(), lane_digest=mine, lane_target_tokens=dict.fromkeys(mine, tokens)
    )
    try:
        return agree_on_step(step, "iteration 7", LAYOUT, dist.group.WORLD, validate=validate)
    except RuntimeError as error:
        return str(error)


SAME = {0: {0: 11, 1: 22}, 1: {0: 11}, 2: {1: 22}}
OTHER = {0: {0: 11, 1: 22}, 1: {0: 11}, 2: {1: 23}}


def test_every_rank_learns_the_target_tokens_of_all_lanes(run_ranks: Callable[..., list]) -> None:
    assert run_ranks(3, agree, SAME, 5, True) == [10, 10, 10]


def test_a_lane_read_differently_is_named_on_every_rank(run_ranks: Callable[..., list]) -> None:
    for message in run_ranks(3, agree, OTHER, 5, True):
        assert "iteration 7" in message
        assert "read other samples for lanes 1:" in message


def test_the_check_can_be_switched_off(run_ranks: Callable[..., list]) -> None:
    assert run_ranks(3, agree, OTHER, 5, False) == [10, 10, 10]


def test_a_batch_without_targets_is_an_error(run_ranks: Callable[..., list]) -> None:
    for message in run_ranks(3, agree, SAME, 0, True):
        assert "no target token in the global batch" in message
