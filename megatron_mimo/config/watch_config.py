"""Flags of logging and tracing, and the ranks that they select.

They are defined here and not beside the code that records, because the watch package imports this
one.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from megatron_mimo.config.services_config import ServicesConfig
from megatron_mimo.settings import (
    Derived,
    Folder,
    MoreThan,
    Number,
    OnlyWith,
    Part,
    Real,
    Switch,
    Within,
    check_bounds,
)
from megatron_mimo.settings.ranges import MOST_ITERATIONS
from megatron_mimo.topology import Layout

_Ranks = Annotated[str, arg(metavar="{dp-replica,all,LIST}")]
_CURVES = "--tensorboard-dir", "--wandb-project", "--mlflow-experiment"
_TRACES = OnlyWith("--timeline-profile", "--profile")


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceConfig:
    """Steps and ranks that are traced.

    Attributes:
        folder: Folder of the traces.
        first: Number of the first traced iteration, from 1.
        end: Number of the iteration after the last traced one.
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
    """Settings of logging and tracing.

    Attributes:
        log_interval: Number of iterations per log line.
        tensorboard_dir: Folder for TensorBoard's event files and metrics.jsonl.
        save_activations: Folder to save the projector's output, the combined embeddings and the
            logits of one iteration in, for `megatron-mimo parity --tensors`.
        save_activations_step: Number of the iteration whose activations are saved; left out: the
            first of the run.
        timeline_profile: Whether to write the actions of ranks in some iterations as Chrome traces,
            which Perfetto opens.
        timeline_dir: Folder of the traces; left out: timeline in --tensorboard-dir.
        timeline_ranks: Ranks that --timeline-profile traces: dp-replica (lane 0 and the ranks of
            other modules that serve it), all, or a list such as 0,4-7.
        profile: Whether to also write a trace of torch's profiler in the same iterations.
        profile_step_start: Number of the first iteration to trace.
        profile_step_end: Number of the iteration after the last one to trace.
        profile_ranks: Ranks that --profile traces, as for --timeline-ranks.
        peak_tflops: Largest number of dense TFLOP/s that a GPU reaches, for the utilisation (MFU);
            left out: by the name of the GPU, for 16-bit training.
        services: Services that record the curves as well.
        traces: Ranks and iterations that are traced; None: none. They follow from the grids.
    """

    log_interval: Annotated[int, Within(1, MOST_ITERATIONS)] = 10
    tensorboard_dir: Folder = None
    save_activations: Folder = None
    save_activations_step: Annotated[
        Number, Within(1, MOST_ITERATIONS), OnlyWith("--save-activations")
    ] = None
    timeline_profile: Switch = False
    timeline_dir: Annotated[Folder, _TRACES] = None
    timeline_ranks: Annotated[_Ranks, OnlyWith("--timeline-profile")] = "dp-replica"
    profile: Switch = False
    profile_step_start: Annotated[int, Within(1, MOST_ITERATIONS), _TRACES] = 10
    profile_step_end: Annotated[int, Within(2, MOST_ITERATIONS + 1), _TRACES] = 12
    profile_ranks: Annotated[_Ranks, OnlyWith("--profile")] = "0"
    peak_tflops: Annotated[Real, MoreThan(0, 1e6), OnlyWith(*_CURVES)] = None
    services: Part[ServicesConfig] = field(default_factory=ServicesConfig)
    traces: Derived[TraceConfig | None] = None

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.profile_step_end <= self.profile_step_start:
            raise ValueError(
                f"--profile-step-end {self.profile_step_end} is the iteration after the last one "
                f"to trace: expected more than --profile-step-start {self.profile_step_start}"
            )

    @property
    def measures(self) -> bool:
        """Whether ranks measure their steps and report at each log interval."""
        return self.tensorboard_dir is not None or self.services.are_any


def watch_config(watching: WatchConfig, layout: Layout, train_iters: int) -> WatchConfig:
    """The flags of logging and tracing, with the ranks and steps that are traced.

    Args:
        watching: Flags with checked ranges.
        layout: The grids of all modules.
        train_iters: Number of the last iteration of the run.

    Raises:
        ValueError: The run does not have the ranks or steps, or there is no folder.
    """
    return replace(watching, traces=_traces(watching, layout, train_iters))


def chosen_ranks(flag: str, choice: str, layout: Layout) -> frozenset[int]:
    """The ranks that a flag names.

    Args:
        flag: Name of the flag, for error messages.
        choice: Value of the flag: "all"; "dp-replica", the ranks of lane 0 and of the replicas
            that serve it; or a list of ranks and ranges of them, as in "0,4-7".
        layout: The grids of all modules.

    Raises:
        ValueError: The value is none of these, or names a rank that does not exist.
    """
    if choice == "all":
        return frozenset(range(layout.world_size))
    if choice == "dp-replica":
        target = layout.target
        replicas = {source.name: layout.serving(source.name, 0) for source in layout.sources}
        replicas[target.name] = (0,)
        return frozenset(
            rank
            for name, grid in layout.modules.items()
            for rank in grid.ranks
            if grid.coordinates(rank).dp in replicas[name]
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


def _traces(watching: WatchConfig, layout: Layout, train_iters: int) -> TraceConfig | None:
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
