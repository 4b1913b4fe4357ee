"""One optimizer step, and one evaluation pass."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.data.loader.batch import StepData, StepLoader
from megatron_mimo.model.program import MimoStep
from megatron_mimo.optim.mimo_optimizer import Update, finalize_gradients
from megatron_mimo.runtime.megatron_core import scale_auxiliary_losses
from megatron_mimo.schedule.laps import Phase
from megatron_mimo.topology.groups import Topology
from megatron_mimo.training.agreement import Agreement, agree_on_step
from megatron_mimo.training.leaving import Leave
from megatron_mimo.training.runner import StepRunner
from megatron_mimo.watch.experts import gather_load
from megatron_mimo.watch.step_watch import UNWATCHED, StepWatch


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """Results of a step.

    Attributes:
        loss: Mean cross entropy per target token, a float64 scalar on the device; meaningful on the
            ranks of the language model's last stage.
        learning_rate: Learning rate of the next update.
        update: Result of the optimizer step.
        experts: Load of the experts in the step, from `gather_load`; None without experts.
        packing_fill: Fraction of the sequences' positions that are not padding, 0 to 1; None
            without packing.
        leave: Reason for which all ranks stop now, if any.
        agreed_loss: The same mean on every rank, as summed in the agreement on the update.
    """

    loss: Tensor
    learning_rate: float
    update: Update
    experts: Tensor | None
    packing_fill: float | None = None
    leave: Leave = Leave.NOT
    agreed_loss: float = 0.0


def train_step(
    runner: StepRunner,
    loader: StepLoader,
    iteration: int,
    global_batch_size: int,
    wish: Leave = Leave.NOT,
    watch: StepWatch = UNWATCHED,
) -> StepMetrics:
    """Draw a global batch, run it forward and backward on all grids, and update every module.

    Args:
        runner: Model, optimizer and executor of this rank.
        loader: Loader of the training samples.
        iteration: Number of the iteration, from 1, for error messages.
        global_batch_size: Number of samples per step, by which the learning-rate schedule advances.
        wish: Reason for which this rank wants to stop after the step, if any.
        watch: Watch that records the parts of the step.

    Raises:
        RuntimeError: The modules read different samples, or a source that trains gets no gradient.
    """
    watch.note(Phase.DATA)
    data = loader.next_step()
    watch.note(Phase.AGREEMENT)
    agreement = agree(runner, data, f"iteration {iteration}", wish)
    watch.note(Phase.PREPARE)
    num_tokens = agreement.target_tokens
    for replica in runner.model.replicas:
        replica.zero_grad()
    loss_scale = runner.optimizer.loss_scale
    scale_auxiliary_losses(loss_scale)
    loss_sum = _run(runner, data, agreement, gradients=True, loss_scale=loss_scale, watch=watch)
    watch.note(Phase.GRADIENTS)
    experts = gather_load(runner.model)
    finalize_gradients(
        runner.model,
        num_tokens,
        scales=_participation_scales(runner, agreement),
        loss_scale=loss_scale,
    )
    watch.note(Phase.OPTIMIZER)
    update = runner.optimizer.step(_own_loss(runner.topology, loss_sum))
    _require_source_gradients(runner, data, update, iteration)
    if update.applied:
        runner.scheduler.step(increment=global_batch_size)
    watch.note(Phase.LOSS)
    return StepMetrics(
        loss=_mean_loss(runner.topology, loss_sum, num_tokens),
        # After the schedule has moved, as Megatron logs it.
        learning_rate=float(runner.scheduler.get_lr({})),
        update=update,
        experts=experts,
        packing_fill=_packing_fill(runner, agreement, global_batch_size),
        leave=Leave(agreement.wish),
        agreed_loss=update.loss_sum / num_tokens,
    )


@torch.no_grad()
def evaluate(runner: StepRunner, loader: StepLoader, num_steps: int) -> Tensor:
    """Mean cross entropy per target token over `num_steps` global batches, a float64 scalar.

    Args:
        runner: Model, optimizer and executor of this rank.
        loader: Loader of the evaluation samples, from their start.
        num_steps: Number of global batches to run.

    Raises:
        RuntimeError: The modules read different samples.
    """
    runner.model.train(False)
    loss_sum, tokens = None, 0
    for index in range(num_steps):
        data = loader.next_step()
        agreement = agree(runner, data, f"evaluation step {index + 1}")
        tokens += agreement.target_tokens
        step_sum = _run(runner, data, agreement, gradients=False)
        loss_sum = step_sum if loss_sum is None else loss_sum + step_sum
    runner.model.train()
    assert loss_sum is not None
    return _mean_loss(runner.topology, loss_sum, tokens)


def agree(runner: StepRunner, data: StepData, where: str, wish: Leave = Leave.NOT) -> Agreement:
    """Call `agree_on_step` with the runner's topology; arguments and errors are its."""
    return agree_on_step(
        data,
        where,
        runner.topology.layout,
        runner.executor.planners,
        runner.topology.control,
        validate=runner.config.validate_data,
        wish=wish,
    )


def _participation_scales(runner: StepRunner, agreement: Agreement) -> Mapping[str, float]:
    """Source name -> number of its dp ranks over that of those with items in the global batch."""
    if not runner.config.correct_participation:
        return {}
    return {
        source.name: source.dp / agreement.participating[source.name]
        for source in runner.topology.layout.sources
        if agreement.participating[source.name]
    }


def _run(
    runner: StepRunner,
    data: StepData,
    agreement: Agreement,
    *,
    gradients: bool,
    loss_scale: float = 1.0,
    watch: StepWatch = UNWATCHED,
) -> Tensor:
    program = MimoStep(runner.model, runner.inputs.of(data), loss_scale)
    plans = [runner.executor.plan(manifest) for manifest in agreement.manifests]
    watch.planned(data, plans)
    runner.executor.run(program, plans, gradients=gradients, note=watch.note)
    return program.loss_sum


def _own_loss(topology: Topology, loss_sum: Tensor) -> Tensor | None:
    """This rank's part of the summed loss, of which tp ranks have copies."""
    target = topology.target
    return loss_sum if target is not None and target.place.tp == 0 else None


def _mean_loss(topology: Topology, loss_sum: Tensor, num_tokens: int) -> Tensor:
    """Sum over the lanes and their cp ranks; tp ranks already hold the same sum."""
    if topology.target is not None:
        dist.all_reduce(loss_sum, group=topology.target.pg_collection.dp_cp)
    return loss_sum / num_tokens


def _packing_fill(runner: StepRunner, agreement: Agreement, num_sequences: int) -> float | None:
    if agreement.positions is None:
        return None
    return agreement.positions / (num_sequences * runner.model.sharding.seq_length)


def _require_source_gradients(
    runner: StepRunner, data: StepData, update: Update, iteration: int
) -> None:
    """Refuse a step in which a source that trains has rows and gets no gradient.

    Raises:
        RuntimeError: There is such a source; the message names it.
    """
    for source in sorted(runner.model.flow.returning):
        if update.module_norms[source] > 0:
            continue
        rows = sum(e.rows for m in data.microbatches for e in m.manifest if e.module == source)
        if rows:
            raise RuntimeError(
                f"iteration {iteration}: {rows} rows of {source} went into the language model, but "
                f"the gradient of {source}, which is to train, is zero: does its last layer feed "
                f"the rows, and does the loss depend on them?"
            )
