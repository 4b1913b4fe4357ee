"""Assemble a rank's engine: groups, model, executor, optimizer, schedule."""

from datetime import timedelta

from megatron_mimo.data import DataRole
from megatron_mimo.model.config import FreezeConfig, ModelConfig
from megatron_mimo.model.mimo import BuildConfig, build_model
from megatron_mimo.optim.config import AdamConfig, ScheduleConfig
from megatron_mimo.optim.mimo_optimizer import MimoOptimizer, build_scheduler
from megatron_mimo.runtime import Device
from megatron_mimo.schedule.actions import GradientFlow
from megatron_mimo.schedule.channels import BoundaryConfig
from megatron_mimo.schedule.executor import Executor
from megatron_mimo.topology import Layout
from megatron_mimo.topology.groups import build_topology
from megatron_mimo.training.step import Engine


def build_engine(
    layout: Layout,
    architecture: ModelConfig,
    freeze: FreezeConfig,
    build: BuildConfig,
    adam: AdamConfig,
    schedule: ScheduleConfig,
    *,
    run_ahead: int,
    check_bridge: bool,
    image_token_id: int,
    validate_data: bool,
    correct_participation: bool = False,
    device: Device,
    timeout: timedelta | None = None,
) -> Engine:
    """Build every part of a rank. Collective over the world.

    Args:
        layout: Both grids.
        architecture: Of every module.
        freeze: What does not train.
        build: How to build.
        adam: Optimizer.
        schedule: Learning rate.
        run_ahead: Microbatches that the encoder may be ahead of the language model.
        check_bridge: Compare sample keys and checksums of all that crosses the bridge.
        image_token_id: Token that rows replace.
        validate_data: Check each step that both grids read the same samples.
        correct_participation: Scale the encoder's gradients as if all its ranks had images.
        device: Of this rank.
        timeout: Longest wait of an operation between ranks; None is torch's own.

    Raises:
        ValueError: A size of the model does not divide by a parallel size.
    """
    topology = build_topology(layout, timeout=timeout)
    model = build_model(architecture, freeze, build, topology, device)
    optimizer = MimoOptimizer(model, adam, topology.control)
    boundary = BoundaryConfig(
        sharding=model.sharding,
        row_width=model.row_width,
        encoder_width=architecture.vision.hidden_size,
        dtype=model.row_dtype,
        device=model.device,
        flow=GradientFlow(
            encoder=model.encoder_trains and not freeze.vision, bridge=model.encoder_trains
        ),
        language_trains=not freeze.language,
        run_ahead=run_ahead,
        check=check_bridge,
    )
    return Engine(
        topology=topology,
        model=model,
        executor=Executor(topology, boundary),
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, adam, schedule),
        image_token_id=image_token_id,
        validate_data=validate_data,
        correct_participation=correct_participation,
    )


def data_role(layout: Layout, rank: int) -> DataRole:
    """Which part of a step's data a rank needs."""
    lanes: set[int] = set()
    text_lane = encoder_rank = None
    if layout.encoder is not None and rank in layout.encoder.ranks:
        encoder_rank = layout.encoder.coordinates(rank).dp
        lanes.update(layout.served(encoder_rank))
    if rank in layout.llm.ranks:
        text_lane = layout.llm.coordinates(rank).dp
        lanes.add(text_lane)
    return DataRole(
        lanes=tuple(sorted(lanes)),
        num_lanes=layout.num_lanes,
        text_lane=text_lane,
        encoder_rank=encoder_rank,
        serving={lane: layout.serving(lane) for lane in lanes},
    )
