"""Observation of a rank's steps: measures them, gathers the ranks' numbers, writes traces."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mimo.bridge.microbatch import MicrobatchPlan
from megatron_mimo.config.watch_config import WatchConfig
from megatron_mimo.data.loader.batch import StepData
from megatron_mimo.model.flops import ModelFlops, ModelWork
from megatron_mimo.runtime.device import Device
from megatron_mimo.runtime.memory import peak_memory
from megatron_mimo.runtime.profiler import StepProfiler
from megatron_mimo.runtime.stopwatch import build_stopwatch
from megatron_mimo.schedule.laps import Label, Lap, Phase, Recorder
from megatron_mimo.topology.groups import Topology
from megatron_mimo.watch.rank_report import rank_report, run_scalars, slot_of
from megatron_mimo.watch.step_watch import Unwatched
from megatron_mimo.watch.traces import (
    chrome_trace,
    clock_offset,
    merge_timelines,
    named_trace_errors,
    profile_file,
    timeline_file,
    write_trace,
)
from megatron_mimo.watch.usage import StepUsage, UsageMeter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Quantities from which the speed of a run is computed.

    Attributes:
        flops: Function that gives the floating-point operations of some work.
        tokens_per_step: Number of positions of a global batch.
        peak_tflops: Peak TFLOP/s of a GPU; None where it is not known.
    """

    flops: Callable[[ModelWork], ModelFlops]
    tokens_per_step: int
    peak_tflops: float | None


class Unobserved(Unwatched):
    """Observer that records nothing."""

    def begin_step(self, iteration: int) -> None:
        """Note that an iteration begins."""

    def end_step(self, iteration: int) -> None:
        """Note that an iteration has ended."""

    def report(self, seconds_per_step: float) -> dict[str, float]:
        """Additional scalars of a log interval by TensorBoard tag; none."""
        return {}

    def close(self) -> None:
        """Note that training has ended."""


class Observer(Unobserved):
    """Observes this rank. The constructor is collective over the world.

    Args:
        config: Settings of what is recorded, the same on every rank.
        topology: Grids and groups of the run.
        device: Device of this rank.
        meter: Meter that counts what each step makes this rank compute and send.
        speed: Quantities from which the speed of the run is computed.
        skipped: Function that gives the number of skipped samples so far of the lane that this rank
            reports on.
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
        self._recording = self._tracing = False
        self._iteration = 0
        self._traced: list[Lap] = []
        self._exchanges: list[tuple[int, float, float]] = []
        self._profiler: StepProfiler | None = None
        self._offset = 0.0
        self._reached = False
        traces, rank = config.traces, topology.rank
        self._writes_timeline = traces is not None and rank in traces.timeline_ranks
        if traces is not None and (self._writes_timeline or (rank == 0 and traces.timeline_ranks)):
            self._offset = clock_offset(topology.control, rank, traces.timeline_ranks)

    def begin_step(self, iteration: int) -> None:
        """Note that an iteration begins."""
        traces = self._traces
        traced = traces is not None and traces.covers(iteration)
        self._tracing = traced and self._writes_timeline
        self._recording = self._measures or self._tracing
        self._iteration = iteration
        self._recorder.begin_step(iteration)
        self._reached = self._reached or traced
        if traces is not None and traced and self._profiler is None:
            rank = self._topology.rank
            if rank in traces.profile_ranks:
                with named_trace_errors(traces.folder):
                    traces.folder.mkdir(parents=True, exist_ok=True)
                self._profiler = StepProfiler(self._device, profile_file(traces.folder, rank))

    def note(self, what: Label) -> None:
        """See `schedule.laps.Note`."""
        if self._recording:
            self._recorder.note(what)

    def planned(self, data: StepData, plans: Sequence[MicrobatchPlan]) -> None:
        """A training step is about to run on this data."""
        if not self._recording:
            return
        usage = self._meter.measure(data, plans)
        if self._measures:
            self._usages.append(usage)
        if self._tracing:
            self._exchanges += [(self._iteration, *span) for span in usage.exchanges]

    def end_step(self, iteration: int) -> None:
        """Note that an iteration has ended."""
        self.note(Phase.BETWEEN)
        if self._traces is not None and iteration + 1 >= self._traces.end:
            self._stop_profiler()

    def report(self, seconds_per_step: float) -> dict[str, float]:
        """Gather the numbers of a log interval from every rank; one collective over the world.

        Args:
            seconds_per_step: Wall time of the interval's steps, on the logging rank.

        Returns:
            Scalars by TensorBoard tag on the logging rank; empty on other ranks, and when nothing
            is measured.
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
            [mine.read(each.tolist()) for each in gathered],
            topology.layout,
            self._speed.flops,
            steps=len(usages),
            seconds_per_step=seconds_per_step,
            tokens_per_step=self._speed.tokens_per_step,
            peak_tflops=self._speed.peak_tflops,
        )

    def close(self) -> None:
        """Write this rank's timeline, and merge the timelines that this machine can read.

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
                self._exchanges,
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
            assert self._traces is not None
            profiler, self._profiler = self._profiler, None
            with named_trace_errors(self._traces.folder):
                profiler.stop()
