"""Flags about watching: which ranks and steps they mean, and what is refused."""

from pathlib import Path

import pytest

from megatron_mimo.config.check import check
from megatron_mimo.config.sections import TrainConfig
from megatron_mimo.config.watch_config import (
    TraceConfig,
    WatchConfig,
    chosen_ranks,
    watch_config,
)
from megatron_mimo.topology import Layout, ModuleGridSpec

# Ranks 0 to 3 encode, two for each replica; lanes are ranks {4, 6}, {5, 7}.
LAYOUT = Layout.of(
    ModuleGridSpec(name="encoder", tp=2, dp=2),
    ModuleGridSpec(name="llm", offset=4, dp=2, pp=2),
    world_size=8,
)
COLOCATED = Layout.of(
    ModuleGridSpec(name="encoder", dp=4),
    ModuleGridSpec(name="llm", tp=2, dp=2),
    world_size=4,
)


@pytest.mark.parametrize(
    ("choice", "layout", "ranks"),
    [
        ("all", LAYOUT, range(8)),
        ("dp-replica", LAYOUT, (0, 1, 4, 6)),
        # Two encoder ranks serve lane 0, which is on ranks 0 and 1 too.
        ("dp-replica", COLOCATED, (0, 1)),
        ("0,5-7, 2", LAYOUT, (0, 2, 5, 6, 7)),
    ],
)
def test_ranks_of_a_choice(choice: str, layout: Layout, ranks: tuple[int, ...]) -> None:
    assert chosen_ranks("--timeline-ranks", choice, layout) == set(ranks)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("0,8", "--timeline-ranks 0,8: 8 is not within the run's ranks, 0 to 7"),
        ("5-3", "5-3 is not within"),
        ("some", "expected all, dp-replica, or ranks such as 0,4-7; 'some' is neither"),
        ("", "'' is neither"),
        ("-1", "'-1' is neither"),
    ],
)
def test_wrong_ranks_are_named(choice: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen_ranks("--timeline-ranks", choice, LAYOUT)


def test_nothing_is_recorded_by_default() -> None:
    config = watch_config(WatchConfig(), LAYOUT, 4)
    assert not config.measures
    assert config.traces is None


def test_traces_stand_beside_the_curves() -> None:
    watching = WatchConfig(tensorboard_dir="runs/a", timeline_profile=True)
    config = watch_config(watching, LAYOUT, 20)
    assert config.measures
    assert config.traces == TraceConfig(
        folder=Path("runs/a/timeline"),
        first=10,
        end=12,
        timeline_ranks=frozenset({0, 1, 4, 6}),
        profile_ranks=frozenset(),
    )
    assert [i for i in range(20) if config.traces.covers(i)] == [10, 11]


def test_the_profiler_has_its_own_ranks() -> None:
    watching = WatchConfig(timeline_dir="t", profile=True, profile_ranks="1,2")
    config = watch_config(watching, LAYOUT, 20)
    assert not config.measures
    assert config.traces is not None
    assert config.traces.profile_ranks == {1, 2}
    assert not config.traces.timeline_ranks


def test_a_window_behind_the_end_is_refused() -> None:
    watching = WatchConfig(timeline_dir="t", timeline_profile=True, profile=True)
    message = (
        "--timeline-profile and --profile from iteration 10 on, but the run ends with iteration 9"
    )
    with pytest.raises(ValueError, match=message):
        watch_config(watching, LAYOUT, 9)


def test_traces_need_a_folder() -> None:
    with pytest.raises(ValueError, match="--profile without a folder: add --timeline-dir"):
        watch_config(WatchConfig(profile=True), LAYOUT, 20)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"timeline_ranks": "all"}, "--timeline-ranks all without --timeline-profile"),
        ({"profile_ranks": "1", "timeline_profile": True}, "--profile-ranks 1 without --profile"),
        ({"timeline_dir": "t"}, "--timeline-dir t without --timeline-profile or --profile"),
        ({"profile_step_start": 3}, "--profile-step-start 3 without"),
        ({"profile_step_end": 10, "profile": True}, "--profile-step-end 10 is the iteration after"),
        ({"profile_step_start": 0, "profile": True}, "--profile-step-start is 0: expected 1 to"),
        ({"peak_tflops": 100.0}, "--peak-tflops 100.0 without --tensorboard-dir"),
        ({"peak_tflops": -1.0, "tensorboard_dir": "t"}, "--peak-tflops is -1.0: expected more"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(TrainConfig(watching=WatchConfig(**given)))
