"""One optimizer step, and one evaluation pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_mimo.data.batch import StepData, StepLoader
from megatron_mimo.model.mimo import MimoModel
from megatron_mimo.model.program import MimoStep
from megatron_mimo.optim.mimo_optimizer import MimoOptimizer, Update, finalize_gradients
from megatron_mimo.runtime.engine import scale_auxiliary_losses
from megatron_mimo.schedule.crossing import Crossing
from megatron_mimo.schedule.executor import Executor
from megatron_mimo.schedule.laps import Label, Phase
from megatron_mimo.topology.groups import Topology
from megatron_mimo.training.agreement import Agreement, agree_on_step
from megatron_mimo.training.experts import gather_load
from megatron_mimo.training.leaving import Leave


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Everything that runs steps on this rank.

    Attributes:
        topology: Grids and groups.
        model: The modules of this rank.
        executor: Runs a step's actions.
        optimizer: Over the modules.
        scheduler: Learning rate.
        image_token_id: Token that rows replace.
        validate_data: Check each step that both grids read the same samples.
        correct_participation: Scale the encoder's gradients as if all its ranks had images.
    """

    topology: Topology
    model: MimoModel
    executor: Executor
    optimizer: MimoOptimizer
    scheduler: OptimizerParamScheduler
    image_token_id: int
    validate_data: bool
    correct_participation: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """What a step reports.

    Attributes:
        loss: float64 scalar on the device, mean cross entropy per target token; meaningful on the
            ranks of the language model's last stage.
        learning_rate: Of the next update.
        update: What the optimizer did.
        experts: `gather_load` of the step.
        packing_fill: Share of the sequences' positions that is no padding; None without packing.
        leave: Whether all ranks leave now, and why.
    """

    loss: Tensor
    learning_rate: float
    update: Update
    experts: Tensor | None
    packing_fill: float | None = None
    leave: Leave = Leave.NOT


class StepWatch(Protocol):
    """Is told how a step goes on; must not wait for the device."""

    def note(self, what: Label) -> None:
        """See `schedule.laps.Note`."""
        ...

    def planned(self, data: StepData, crossings: Sequence[Crossing]) -> None:
        """The step is about to run on this data."""
        ...


class Unwatched(StepWatch):
    """Looks away."""

    def note(self, what: Label) -> None:
        """See `StepWatch.note`."""

    def planned(self, data: StepData, crossings: Sequence[Crossing]) -> None:
        """See `StepWatch.planned`."""


_UNWATCHED = Unwatched()


def train_step(
    engine: Engine,
    loader: StepLoader,
    iteration: int,
    global_batch_size: int,
    wish: Leave = Leave.NOT,
    watch: StepWatch = _UNWATCHED,
) -> StepMetrics:
    """Draw a global batch, run it forward and backward on both grids, and update every module.

    Args:
        engine: This rank's parts.
        loader: Training samples.
        iteration: Counts from 1; for errors.
        global_batch_size: Samples per step, by which the learning-rate schedule advances.
        wish: Whether this rank wants to leave after the step.
        watch: Told what the rank does.

    Raises:
        RuntimeError: The grids read other samples, or no gradient reaches a trainable encoder.
    """
    watch.note(Phase.DATA)
    data = loader.next_step()
    watch.note(Phase.AGREEMENT)
    agreement = agree(engine, data, f"iteration {iteration}", wish)
    watch.note(Phase.PREPARE)
    num_tokens = agreement.target_tokens
    for replica in engine.model.replicas:
        replica.zero_grad()
    loss_scale = engine.optimizer.loss_scale
    scale_auxiliary_losses(loss_scale)
    loss_sum = _run(engine, data, agreement, gradients=True, loss_scale=loss_scale, watch=watch)
    watch.note(Phase.GRADIENTS)
    experts = gather_load(engine.model, len(data.microbatches))
    finalize_gradients(
        engine.model,
        num_tokens,
        encoder_scale=_encoder_scale(engine, agreement),
        loss_scale=loss_scale,
    )
    watch.note(Phase.OPTIMIZER)
    update = engine.optimizer.step()
    _require_encoder_gradient(engine, data, update, iteration)
    if update.applied:
        engine.scheduler.step(increment=global_batch_size)
    watch.note(Phase.LOSS)
    return StepMetrics(
        loss=_mean_loss(engine.topology, loss_sum, num_tokens),
        # After the schedule has moved, as Megatron logs it.
        learning_rate=float(engine.scheduler.get_lr({})),
        update=update,
        experts=experts,
        packing_fill=_packing_fill(engine, agreement, global_batch_size),
        leave=Leave(agreement.wish),
    )


@torch.no_grad()
def evaluate(engine: Engine, loader: StepLoader, num_steps: int) -> Tensor:
    """Mean cross entropy per target token over `num_steps` global batches; float64 scalar.

    Args:
        engine: This rank's parts.
        loader: Evaluation samples, from their start.
        num_steps: Global batches to run.
    """
    engine.model.train(False)
    loss_sum, tokens = None, 0
    for index in range(num_steps):
        data = loader.next_step()
        agreement = agree(engine, data, f"evaluation step {index + 1}")
        tokens += agreement.target_tokens
        step_sum = _run(engine, data, agreement, gradients=False)
        loss_sum = step_sum if loss_sum is None else loss_sum + step_sum
    engine.model.train()
    assert loss_sum is not None
    return _mean_loss(engine.topology, loss_sum, tokens)


def agree(engine: Engine, data: StepData, where: str, wish: Leave = Leave.NOT) -> Agreement:
    """`agree_on_step` over the engine's topology."""
    return agree_on_step(
        data,
        where,
        engine.topology.layout,
        engine.executor.planner,
        engine.topology.control,
        validate=engine.validate_data,
        wish=wish,
    )


def _encoder_scale(engine: Engine, agreement: Agreement) -> float:
    encoder = engine.topology.layout.encoder
    if not engine.correct_participation or encoder is None or not agreement.participating:
        return 1.0
    return encoder.dp / agreement.participating


def _run(
    engine: Engine,
    data: StepData,
    agreement: Agreement,
    *,
    gradients: bool,
    loss_scale: float = 1.0,
    watch: StepWatch = _UNWATCHED,
) -> Tensor:
    program = MimoStep(engine.model, data.microbatches, engine.image_token_id, loss_scale)
    crossings = [engine.executor.plan(manifest) for manifest in agreement.manifests]
    watch.planned(data, crossings)
    engine.executor.run(program, crossings, gradients=gradients, note=watch.note)
    return program.loss_sum


def _mean_loss(topology: Topology, loss_sum: Tensor, num_tokens: int) -> Tensor:
    """Sum over the lanes and their cp ranks; tp ranks already hold the same sum."""
    if topology.llm is not None:
        dist.all_reduce(loss_sum, group=topology.llm.pg_collection.dp_cp)
    return loss_sum / num_tokens


def _packing_fill(engine: Engine, agreement: Agreement, num_sequences: int) -> float | None:
    if agreement.positions is None:
        return None
    return agreement.positions / (num_sequences * engine.model.sharding.seq_length)


def _require_encoder_gradient(
    engine: Engine, data: StepData, update: Update, iteration: int
) -> None:
    if not engine.model.encoder_trains or update.module_norms["encoder"] > 0:
        return
    rows = sum(entry.rows for m in data.microbatches for entry in m.manifest)
    if rows:
        raise RuntimeError(
            f"iteration {iteration}: {rows} rows of images went into the language model, but the "
            f"gradient of the trainable encoder is zero: vision does not train. Is the "
            f"projector's output used, and does the loss depend on it?"
        )
