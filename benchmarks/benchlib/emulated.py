"""Steps whose forwards and backwards are waits; rows and gradients cross for real."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from benchlib.peer_step import VISION, communicator, groups_of
from megatron_mimo.bridge.channels import TransportConfig
from megatron_mimo.bridge.manifest import Manifest, ManifestEntry
from megatron_mimo.bridge.microbatch import MicrobatchManifest
from megatron_mimo.schedule.actions import Action, Kind, build_schedule
from megatron_mimo.schedule.executor import Executor, ExecutorConfig, StepProgram
from megatron_mimo.schedule.graph import GradientFlow
from megatron_mimo.schedule.timeline import timeline
from megatron_mimo.topology import Layout, SequenceSharding
from megatron_mimo.topology.groups import Topology

_FLOW = GradientFlow(returning=frozenset({"encoder"}), inside=frozenset({"encoder"}))
ROWS, WIDTH = 64, 256
# A backward takes this many forwards.
BACKWARD = 2.0
Waits = dict[int, list[float]]


class _Wait(torch.autograd.Function):
    """Passes its input on after a while, and the gradient back after a longer one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        time.sleep(BACKWARD * ctx.seconds)
        return gradients[0], None


def our_emulated(
    topology: Topology, waits: Waits, run_ahead: int
) -> tuple[Callable[[], None], float]:
    """A step over our executor, and the length of its schedule's critical path in seconds."""
    layout = topology.layout
    manifest = tuple(
        ManifestEntry(
            module="encoder", source_rank=dp, lane=lane, rows=ROWS, sequence=0, start=ROWS * i
        )
        for lane in range(layout.num_lanes)
        for i, dp in enumerate(layout.serving("encoder", lane))
    )
    manifests = [manifest] * len(waits[topology.rank])
    return emulated_over(topology, waits, manifests, run_ahead)


def emulated_over(
    topology: Topology, waits: Waits, manifests: Sequence[Manifest], run_ahead: int
) -> tuple[Callable[[], None], float]:
    """A step over our executor whose microbatches have these items, and its critical path.

    Args:
        topology: Grids and groups of this rank.
        waits: Rank -> seconds of each microbatch's forward.
        manifests: Items of each microbatch.
        run_ahead: Microbatches that the encoder may be ahead.

    Returns:
        A function that runs the step, and the length of its schedule's critical path in seconds.
    """
    layout, rank = topology.layout, topology.rank
    num = len(manifests)
    # As long as the longest lane.
    ends = [entry.start + entry.rows for manifest in manifests for entry in manifest]
    executor = Executor(
        topology,
        ExecutorConfig(
            transport=TransportConfig(
                row_width=WIDTH, dtype=torch.float32, device=torch.device("cpu")
            ),
            sharding=SequenceSharding(seq_length=max(ends)),
            flow=_FLOW,
            run_ahead=run_ahead,
        ),
    )
    plans = [executor.plan(MicrobatchManifest(entries=tuple(each))) for each in manifests]
    program = _Program(topology, waits[rank], manifests)

    def duration(of: int, action: Action) -> float:
        return waits[of][action.microbatch] * (BACKWARD if action.kind is Kind.BACKWARD else 1)

    schedule = build_schedule(
        layout,
        num_microbatches=num,
        run_ahead=run_ahead,
        gradients=True,
        flow=_FLOW,
    )
    critical = timeline(layout, schedule, duration).makespan
    return lambda: executor.run(program, plans, gradients=True), critical


class _Program(StepProgram):
    """The model's part of our step."""

    def __init__(
        self, topology: Topology, waits: list[float], manifests: Sequence[Manifest]
    ) -> None:
        self._waits = waits
        self._last = topology.target is not None and topology.target.is_last_stage
        encoder = topology.modules.get("encoder")
        dp = None if encoder is None else encoder.place.dp
        held = [sum(e.rows for e in each if e.source_rank == dp) for each in manifests]
        self._leaves = [torch.ones(max(rows, 1), WIDTH, requires_grad=True) for rows in held]

    def forward(self, module: str, microbatch: int, inputs: Mapping[str, Tensor]) -> Tensor:
        given = next(iter(inputs.values()), self._leaves[microbatch])
        output: Tensor = _Wait.apply(given, self._waits[microbatch])  # type: ignore[no-untyped-call]
        return output.sum() if self._last else output

    def hidden_rows(self, module: str, microbatch: int) -> int:
        return ROWS

    def idle(self, module: str, backward: bool) -> None:
        """Replicas do nothing together."""

    def begin_last_backward(self, module: str) -> None:
        """No gradients are reduced."""


def _rows_held(layout: Layout) -> int:
    """Rows of an encoder rank: one share for each lane that it serves."""
    return ROWS * len(layout.served("encoder", 0))


class _Emulated(nn.Module):
    """One module of the peer on this rank."""

    def __init__(self, topology: Topology, waits: list[float], config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self._topology = topology
        self._waits = waits
        self._inputs: Any = None
        self._leaf = torch.ones(_rows_held(topology.layout), WIDTH, requires_grad=True)

    def set_input_tensor(self, tensors: Any) -> None:
        """The peer hands over a list of a dict of what arrived."""
        self._inputs = tensors[0] if isinstance(tensors, list) else tensors

    def forward(self, m: int) -> Any:
        if "encoder" in self._topology.modules:
            return {VISION: _Wait.apply(self._leaf, self._waits[m])}  # type: ignore[no-untyped-call]
        (given,) = self._inputs.values()
        given = given[0] if isinstance(given, list) else given
        output = _Wait.apply(given, self._waits[m])  # type: ignore[no-untyped-call]
        assert self._topology.target is not None
        if self._topology.target.is_last_stage:
            return output
        # Stages of the language model exchange [S, B, H].
        return {MIMO_LANGUAGE_MODULE_KEY: output.view(ROWS, 1, WIDTH)}


def peer_emulated(topology: Topology, waits: Waits) -> Callable[[], None]:
    """A step over megatron-core's schedule and communicator."""
    config = TransformerConfig(
        num_layers=topology.layout.target.pp,
        hidden_size=WIDTH,
        num_attention_heads=1,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        pipeline_model_parallel_size=topology.layout.target.pp,
    )
    over_modules = communicator(topology.layout, config)
    mine = waits[topology.rank]
    model = _Emulated(topology, mine, config)

    def forward_step(microbatches: Any, given: nn.Module) -> tuple[Any, Callable[..., Any]]:
        def loss(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total = output.sum()
            return total, torch.ones((), dtype=torch.int), total.detach()

        return given(next(microbatches)), loss

    def step() -> None:
        forward_backward_pipelining_without_interleaving(
            forward_step_func=forward_step,
            data_iterator=iter(range(len(mine))),
            model=model,
            num_microbatches=len(mine),
            seq_length=ROWS,
            micro_batch_size=1,
            p2p_communicator=over_modules,
            pg_collection=groups_of(topology),
        )

    return step
