"""What a run records of itself, from its flags."""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_mimo.topology import Layout
from megatron_mimo.training.config import WatchingSection


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceConfig:
    """Which steps of which ranks are traced.

    Attributes:
        folder: Where the traces go.
        first: First iteration, from 1.
        end: The iteration after the last.
        timeline_ranks: Global ranks that write their actions.
        profile_ranks: Global ranks that write a trace of torch's profiler.
    """

    folder: Path
    first: int
    end: int
    timeline_ranks: frozenset[int]
    profile_ranks: frozenset[int]

    def covers(self, iteration: int) -> bool:
        """Whether an iteration is traced."""
        return self.first <= iteration < self.end


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """What a run records of itself; the same on every rank.

    Attributes:
        measures: Whether ranks measure their steps and report at each log interval.
        traces: What is traced; None for nothing.
        peak_tflops: Of a GPU, for the utilisation; None to go by its name.
    """

    measures: bool = False
    traces: TraceConfig | None = None
    peak_tflops: float | None = None


def watch_config(watching: WatchingSection, layout: Layout, train_iters: int) -> WatchConfig:
    """Read and check the flags about watching.

    Args:
        watching: The flags, their ranges checked.
        layout: Both grids.
        train_iters: Last iteration of the run.

    Raises:
        ValueError: Ranks or steps that the run does not have, or no folder.
    """
    return WatchConfig(
        measures=watching.tensorboard_dir is not None,
        traces=_traces(watching, layout, train_iters),
        peak_tflops=watching.peak_tflops,
    )


def chosen_ranks(flag: str, choice: str, layout: Layout) -> frozenset[int]:
    """The ranks that a flag names.

    Args:
        flag: Its name, for errors.
        choice: "all"; "dp-replica", the ranks of lane 0 and of the encoder ranks that serve it; or
            a list of ranks and spans of them, as in "0,4-7".
        layout: Both grids.

    Raises:
        ValueError: It is none of these, or names a rank that is not there.
    """
    if choice == "all":
        return frozenset(range(layout.world_size))
    if choice == "dp-replica":
        serving = layout.serving(0)
        return frozenset(
            rank
            for grid in layout.grids
            for rank in grid.ranks
            if grid.coordinates(rank).dp in ((0,) if grid is layout.llm else serving)
        )
    found: set[int] = set()
    for part in choice.split(","):
        bounds = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if bounds is None:
            raise ValueError(
                f"{flag} {choice}: expected all, dp-replica, or ranks such as 0,4-7; "
                f"{part!r} is neither a rank nor a span of ranks"
            )
        low, high = int(bounds[1]), int(bounds[2] or bounds[1])
        if low > high or high >= layout.world_size:
            raise ValueError(
                f"{flag} {choice}: {part.strip()} is not within the run's ranks, 0 to "
                f"{layout.world_size - 1}"
            )
        found.update(range(low, high + 1))
    return frozenset(found)


def _traces(watching: WatchingSection, layout: Layout, train_iters: int) -> TraceConfig | None:
    on = [
        flag
        for flag, is_on in (
            ("--timeline-profile", watching.timeline_profile),
            ("--profile", watching.profile),
        )
        if is_on
    ]
    if not on:
        return None
    first, end = watching.profile_step_start, watching.profile_step_end
    if first > train_iters:
        raise ValueError(
            f"{' and '.join(on)} from iteration {first} on, but the run ends with iteration "
            f"{train_iters}: lower --profile-step-start"
        )
    folder = watching.timeline_dir
    if folder is None:
        if watching.tensorboard_dir is None:
            raise ValueError(f"{' and '.join(on)} without a folder: add --timeline-dir")
        folder = str(Path(watching.tensorboard_dir) / "timeline")
    none: frozenset[int] = frozenset()
    return TraceConfig(
        folder=Path(folder),
        first=first,
        end=end,
        timeline_ranks=(
            chosen_ranks("--timeline-ranks", watching.timeline_ranks, layout)
            if watching.timeline_profile
            else none
        ),
        profile_ranks=(
            chosen_ranks("--profile-ranks", watching.profile_ranks, layout)
            if watching.profile
            else none
        ),
    )
