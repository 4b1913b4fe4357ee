"""Parts that run steps on a rank, and their construction: groups, model, executor, optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from megatron_mimo.bridge.channels import TransportConfig
from megatron_mimo.model.config import Frozen, ModelConfig
from megatron_mimo.model.inputs import InputReader
from megatron_mimo.model.mimo import BuildConfig, build_model
from megatron_mimo.optim.config import AdamConfig, ScheduleConfig
from megatron_mimo.optim.mimo_optimizer import MimoOptimizer, build_scheduler
from megatron_mimo.optim.train_state import TrainState
from megatron_mimo.runtime import Device
from megatron_mimo.schedule.executor import Executor, ExecutorConfig
from megatron_mimo.topology import Layout
from megatron_mimo.topology.groups import build_topology


@dataclass(frozen=True, kw_only=True, slots=True)
class StepConfig:
    """Settings of steps, equal on every rank.

    Attributes:
        placeholder_ids: Source name -> number of the token that its rows replace.
        run_ahead: Number of microbatches that a source may be ahead of the language model.
        check_bridge: Whether both ends compare sample keys and checksums of every transfer over a
            bridge.
        validate_data: Whether each step checks that all modules read the same samples.
        correct_participation: Whether to scale a source's gradients as if all its replicas had
            items.
    """

    placeholder_ids: Mapping[str, int]
    run_ahead: int = 1
    check_bridge: bool = False
    validate_data: bool = True
    correct_participation: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRunner(TrainState):
    """The parts that run steps on this rank.

    Attributes:
        executor: Executor of a step's actions.
        inputs: What prepares the inputs of this rank's stages.
        config: Settings of steps.
    """

    executor: Executor
    inputs: InputReader
    config: StepConfig


def build_runner(
    layout: Layout,
    architecture: ModelConfig,
    frozen: Frozen,
    build: BuildConfig,
    adam: AdamConfig,
    schedule: ScheduleConfig,
    config: StepConfig,
    *,
    device: Device,
    timeout: timedelta | None = None,
) -> StepRunner:
    """Build all parts of a rank. Collective over the world.

    Args:
        layout: The grids of all modules.
        architecture: Architecture of every module.
        frozen: Names of the parts that do not train.
        build: Further settings of the modules.
        adam: Settings of the optimizer.
        schedule: Schedule of the learning rate, in samples.
        config: Settings of steps.
        device: Device of this rank.
        timeout: Longest time that an operation between ranks waits; None for torch's default.

    Raises:
        ValueError: A size of the model does not divide by a parallel size.
    """
    topology = build_topology(layout, device=device, timeout=timeout)
    model = build_model(architecture, frozen, build, topology, device)
    optimizer = MimoOptimizer(model, adam, tuple(layout.modules), topology.control)
    step = ExecutorConfig(
        transport=TransportConfig(
            row_width=model.row_width,
            hidden_widths=architecture.hidden_widths,
            dtype=model.row_dtype,
            device=model.device,
            check=config.check_bridge,
        ),
        sharding=model.sharding,
        flow=model.flow,
        target_trains=model.trains,
        run_ahead=config.run_ahead,
    )
    return StepRunner(
        topology=topology,
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, adam, schedule),
        executor=Executor(topology, step),
        inputs=InputReader(model, config.placeholder_ids),
        config=config,
    )
