"""Watches a rank's steps: measures them, gathers what ranks measured, and writes traces."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mimo.data.batch import StepData
from megatron_mimo.model.flops import ModelFlops, Work
from megatron_mimo.runtime.device import Device
from megatron_mimo.runtime.peak import peak_memory
from megatron_mimo.runtime.profiler import StepProfiler
from megatron_mimo.runtime.stopwatch import build_stopwatch
from megatron_mimo.schedule.crossing import Crossing
from megatron_mimo.schedule.laps import Label, Lap, Phase, Recorder
from megatron_mimo.topology.groups import Topology
from megatron_mimo.training.rank_report import RankReport, rank_report, run_scalars, slot_of
from megatron_mimo.training.step import Unwatched
from megatron_mimo.training.traces import (
    chrome_trace,
    clock_offset,
    merge_timelines,
    profile_file,
    timeline_file,
    write_trace,
)
from megatron_mimo.training.usage import StepUsage, UsageMeter
from megatron_mimo.training.watch_config import WatchConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What the speed of a run follows from.

    Attributes:
        flops: Of some work.
        tokens_per_step: Positions of a global batch.
        peak_tflops: Of a GPU; None where it is not known.
    """

    flops: Callable[[Work], ModelFlops]
    tokens_per_step: int
    peak_tflops: float | None


class Unobserved(Unwatched):
    """Records nothing."""

    def begin_step(self, iteration: int) -> None:
        """An iteration begins."""

    def end_step(self, iteration: int) -> None:
        """An iteration has ended."""

    def report(self, seconds_per_step: float) -> dict[str, float]:
        """A log interval ends; more scalars of it, by TensorBoard tag."""
        return {}

    def close(self) -> None:
        """Training has ended."""


class Observer(Unobserved):
    """Watches this rank. Making it is collective over the world.

    Args:
        config: What is recorded; the same on every rank.
        topology: Grids and groups.
        device: Of this rank.
        meter: Counts what steps bring to this rank.
        speed: What the speed of the run follows from.
        skipped: Samples left out so far of the lane for which this rank answers.
    """

    def __init__(
        self,
        config: WatchConfig,
        topology: Topology,
        device: Device,
        meter: UsageMeter,
        speed: Speed,
        skipped: Callable[[], int],
    ) -> None:
        self._measures, self._traces = config.measures, config.traces
        self._topology, self._device = topology, device
        self._meter, self._speed, self._skipped = meter, speed, skipped
        self._recorder = Recorder(build_stopwatch(device))
        self._usages: list[StepUsage] = []
        self._recording = False
        self._traced: list[Lap] = []
        self._profiler: StepProfiler | None = None
        self._offset = 0.0
        self._reached = False
        traces, rank = config.traces, topology.rank
        self._writes_timeline = traces is not None and rank in traces.timeline_ranks
        if traces is not None and (self._writes_timeline or (rank == 0 and traces.timeline_ranks)):
            self._offset = clock_offset(topology.control, rank, traces.timeline_ranks)

    def begin_step(self, iteration: int) -> None:
        """An iteration begins."""
        traces = self._traces
        traced = traces is not None and traces.covers(iteration)
        self._recording = self._measures or (traced and self._writes_timeline)
        self._recorder.begin_step(iteration)
        self._reached = self._reached or traced
        if traces is not None and traced and self._profiler is None:
            rank = self._topology.rank
            if rank in traces.profile_ranks:
                traces.folder.mkdir(parents=True, exist_ok=True)
                self._profiler = StepProfiler(self._device, profile_file(traces.folder, rank))

    def note(self, what: Label) -> None:
        """See `schedule.laps.Note`."""
        if self._recording:
            self._recorder.note(what)

    def planned(self, data: StepData, crossings: Sequence[Crossing]) -> None:
        """A training step is about to run on this data."""
        if self._measures:
            self._usages.append(self._meter.measure(data, crossings))

    def end_step(self, iteration: int) -> None:
        """An iteration has ended."""
        self.note(Phase.BETWEEN)
        if self._traces is not None and iteration + 1 >= self._traces.end:
            self._stop_profiler()

    def report(self, seconds_per_step: float) -> dict[str, float]:
        """Gather a log interval of every rank; one collective over the world.

        Args:
            seconds_per_step: Wall time of the interval's steps, on the logging rank.

        Returns:
            Scalars by TensorBoard tag on the logging rank; empty on others and without measuring.
        """
        laps = self._take()
        if not self._measures:
            return {}
        topology = self._topology
        usages, self._usages = self._usages, []
        mine = rank_report(
            laps,
            usages,
            topology.layout,
            topology.rank,
            skipped=self._skipped(),
            peak_memory=peak_memory(self._device),
        )
        numbers = torch.tensor(mine.to_numbers(), dtype=torch.float64)
        gathered: list[torch.Tensor] | None = None
        if topology.is_logging_rank:
            gathered = [torch.empty_like(numbers) for _ in range(topology.layout.world_size)]
        dist.gather(numbers, gathered, dst=topology.layout.logging_rank, group=topology.control)
        if gathered is None:
            return {}
        return run_scalars(
            [RankReport.from_numbers(each.tolist()) for each in gathered],
            topology.layout,
            self._speed.flops,
            seconds_per_step=seconds_per_step,
            tokens_per_step=self._speed.tokens_per_step,
            peak_tflops=self._speed.peak_tflops,
        )

    def close(self) -> None:
        """Training has ended: write this rank's timeline, and all that can be seen as one.

        Collective over the world.

        Raises:
            RuntimeError: A file cannot be written.
        """
        traces, topology = self._traces, self._topology
        self._stop_profiler()
        if traces is None:
            return
        if not self._reached:
            logger.warning(
                "nothing was traced: no iteration of this run was one of --profile-step-start %d "
                "to --profile-step-end %d, the last one left out",
                traces.first,
                traces.end,
            )
            return
        if not traces.timeline_ranks:
            return
        self._take()
        if self._writes_timeline:
            rank = topology.rank
            trace = chrome_trace(
                rank,
                topology.role,
                self._traced,
                self._offset,
                lambda what: slot_of(what, topology.layout, rank)[1],
            )
            write_trace(timeline_file(traces.folder, rank), trace)
        dist.barrier(group=topology.control)
        if topology.is_logging_rank:
            merged = merge_timelines(traces.folder, traces.timeline_ranks)
            logger.info("timeline of iterations %d to %d: %s", traces.first, traces.end - 1, merged)

    def _take(self) -> list[Lap]:
        laps = self._recorder.take()
        traces = self._traces
        if traces is not None and self._writes_timeline:
            self._traced += [lap for lap in laps if traces.covers(lap.iteration)]
        return laps

    def _stop_profiler(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
