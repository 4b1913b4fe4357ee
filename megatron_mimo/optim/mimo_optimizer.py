"""One distributed optimizer per module, stepped as one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.grad_scaler import (
    ConstantGradScaler,
    DynamicGradScaler,
    MegatronGradScaler,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_mimo.model.mimo import MimoModel, ModuleReplica
from megatron_mimo.modules.families import adapter_of
from megatron_mimo.optim.config import AdamConfig, LossScaleConfig, ScheduleConfig
from megatron_mimo.optim.sharded_adam import ShardedAdam
from megatron_mimo.optim.state import ParamState, param_states, set_step, state_tensors
from megatron_mimo.runtime.megatron_core import world_is


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """Result of an optimizer step, equal on every rank.

    Attributes:
        applied: Whether weights were updated; they are not when the loss or a gradient is not
            finite.
        grad_norm: Global gradient norm over all modules, before clipping.
        module_norms: Gradient norm of each module by its name; 0 for one that does not train.
        num_zeros: Number of zeros in the gradients of all modules; None when not counted.
        loss_scale: Factor that the step's loss was multiplied by.
        loss_sum: Summed cross entropy of all ranks, from what each gave to the step.
        scale_falls: Whether the scale is not yet the smallest, so that gradients which are not
            finite make it fall.
    """

    applied: bool
    grad_norm: float
    module_norms: Mapping[str, float]
    num_zeros: int | None
    loss_scale: float
    loss_sum: float = 0.0
    scale_falls: bool = False


class MimoOptimizer:
    """Chains one megatron-core distributed optimizer per module that trains on this rank.

    A frozen module has no optimizer, but its ranks still take part in the agreement.

    Args:
        model: The modules of this rank.
        config: Settings of AdamW and of clipping.
        names: Names of all modules of the layout, equal on every rank.
        control: Group of the world, gloo.
    """

    def __init__(
        self,
        model: MimoModel,
        config: AdamConfig,
        names: Sequence[str],
        control: dist.ProcessGroup,
    ) -> None:
        self._config = config
        # Position of each module in the vector that the world agrees on.
        self._names = tuple(names)
        self._control = control
        self._device = model.device
        self._num_updates = 0
        self._scaler = _scaler(config.loss_scale)
        self._optimizers: dict[str, MegatronOptimizer | ShardedAdam] = {
            replica.name: _build(replica, _settings(replica, config))
            for replica in model.replicas
            if replica.wrapper is not None
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of every optimizer of this rank, for the scheduler."""
        return [group for o in self._optimizers.values() for group in o.param_groups]

    @property
    def loss_scale(self) -> float:
        """Factor of the next loss; 1 unless parameters are float16."""
        return float(self._scaler.scale) if self._scaler is not None else 1.0

    @property
    def scaler_state(self) -> dict[str, Any]:
        """State of the loss scale; empty where it is 1."""
        return self._scaler.state_dict() if self._scaler is not None else {}

    @scaler_state.setter
    def scaler_state(self, state: dict[str, Any]) -> None:
        if self._scaler is not None and state:
            self._scaler.load_state_dict(state)
            _kept_on_host(self._scaler)

    @property
    def num_updates(self) -> int:
        """Number of updates so far, as Adam's bias correction counts them; equal on every rank."""
        return self._num_updates

    @num_updates.setter
    def num_updates(self, number: int) -> None:
        self._num_updates = number
        for optimizer in self._optimizers.values():
            set_step(optimizer, number)

    def param_states(self) -> dict[int, ParamState]:
        """The part of each weight's state that this rank owns, by the weight's address."""
        found: dict[int, ParamState] = {}
        for optimizer in self._optimizers.values():
            found |= param_states(optimizer)
        return found

    def state_tensors(self, module: str) -> list[Tensor]:
        """A module's optimizer state on this rank, float32 [n], beyond weights of the model."""
        optimizer = self._optimizers.get(module)
        return [] if optimizer is None else list(state_tensors(optimizer))

    def refresh_main_params(self) -> None:
        """Copy the model's weights into the float32 main parameters, after loading only weights.

        Without this the first update would start from the initial weights.
        """
        for optimizer in self._optimizers.values():
            optimizer.reload_model_params()

    @torch.no_grad()
    def step(self, loss: Tensor | None = None) -> Update:
        """Clip by the global norm of all modules and update every module.

        The gradients must be finalised. One reduction of a few numbers over the world, on the host,
        agrees on the norms and on the loss; stages in which no part trains take part in it too.

        Args:
            loss: This rank's part of the summed loss, a scalar; None for no part.
        """
        for optimizer in self._optimizers.values():
            # Without loss scaling this only moves gradients to the fp32 main parameters.
            optimizer.prepare_grads()
        norms, zeros, loss_sum = self._agree(loss)
        total = math.sqrt(sum(norm * norm for norm in norms.values()))
        applied = math.isfinite(total) and math.isfinite(loss_sum)
        if applied:
            for optimizer in self._optimizers.values():
                if self._config.clip_grad > 0:
                    clip_grad_by_total_norm_fp32(
                        optimizer.get_parameters(), self._config.clip_grad, total
                    )
                optimizer.step_with_ready_grads()
            self._num_updates += 1
        scale, scale_falls = self.loss_scale, _can_fall(self._scaler)
        if self._scaler is not None:
            # The result of the agreement, so that the scale stays equal on every rank.
            self._scaler.update(not applied)
        return Update(
            applied=applied,
            grad_norm=total,
            module_norms=norms,
            num_zeros=sum(zeros) if self._config.log_num_zeros else None,
            loss_scale=scale,
            loss_sum=loss_sum,
            scale_falls=scale_falls,
        )

    def _agree(self, loss: Tensor | None) -> tuple[dict[str, float], list[int], float]:
        """Norm and number of zeros of every module, and the summed loss, on every rank.

        This is the one place of a step that waits for the device: whether weights are updated, and
        by how much gradients are clipped, is decided on the host.

        Optimizer shards hold every gradient of a module once, so squares and zeros add up.
        """
        count = len(self._names)
        # Squares of every module, zeros of every module, the loss: on the device until all are
        # there, so that the host waits for it once.
        numbers = torch.zeros(2 * count + 1, dtype=torch.float64, device=self._device)
        for name, optimizer in self._optimizers.items():
            column = self._names.index(name)
            gradients = _own_gradients(optimizer)
            if gradients:
                numbers[column] = _sum_of_squares(gradients)
                if self._config.log_num_zeros:
                    numbers[count + column] = sum((grad == 0).sum() for grad in gradients)
        if loss is not None:
            numbers[-1] = loss
        message = numbers.cpu()
        dist.all_reduce(message, op=dist.ReduceOp.SUM, group=self._control)
        squares, zeros = message[:-1].view(2, count).tolist()
        # NaN survives a sum, but not a comparison of losses; infinity says the same.
        norms = [math.sqrt(s) if math.isfinite(s) else math.inf for s in squares]
        counts = [int(count) for count in zeros]
        return dict(zip(self._names, norms, strict=True)), counts, float(message[-1])


def finalize_gradients(
    model: MimoModel,
    num_target_tokens: int,
    *,
    scales: Mapping[str, float] | None = None,
    loss_scale: float = 1.0,
) -> None:
    """Sum each module's gradients over its own groups, then divide once.

    Args:
        model: The modules of this rank, after the backward of every microbatch.
        num_target_tokens: Number of target tokens of the global batch over all lanes, at least 1.
        scales: Module name -> factor of its gradients; 1 for modules that are left out, and None.
        loss_scale: Factor that the losses were multiplied by.
    """
    for replica in model.replicas:
        if replica.sharded is not None:
            replica.sharded.reduce_gradients()
        if replica.ddp is not None:
            finalize_model_grads([replica.ddp], pg_collection=replica.groups.pg_collection)
        if replica.wrapper is not None:
            scale = (scales or {}).get(replica.groups.spec.name, 1.0)
            replica.wrapper.scale_gradients(scale / (num_target_tokens * loss_scale))


def build_scheduler(
    optimizer: MimoOptimizer, config: AdamConfig, schedule: ScheduleConfig
) -> OptimizerParamScheduler:
    """The learning-rate schedule over every module's parameter groups; steps are samples."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=schedule.warmup_samples,
        lr_decay_steps=schedule.decay_samples,
        lr_decay_style=schedule.style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=schedule.decay_samples,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.wsd_decay_samples,
        lr_wsd_decay_style=schedule.wsd_decay_style,
    )


def _own_gradients(optimizer: MegatronOptimizer | ShardedAdam) -> list[Tensor]:
    """Gradients that this rank alone counts: no copies of tensor-parallel peers or tied weights."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [grad for part in parts for grad in part.get_grads_for_grad_norm()]


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements, a float64 scalar; float64 beyond each tensor.

    Args:
        gradients: Gradients of any shapes and dtypes, at least one.
    """
    norms = torch.stack(torch._foreach_norm([grad.float() for grad in gradients]))
    return norms.double().square().sum()


def _scaler(config: LossScaleConfig | None) -> MegatronGradScaler | None:
    if config is None:
        return None
    if config.constant is not None:
        return _kept_on_host(ConstantGradScaler(config.constant))
    return _kept_on_host(
        DynamicGradScaler(
            initial_scale=config.initial,
            min_scale=config.least,
            growth_factor=2.0,
            backoff_factor=0.5,
            growth_interval=config.window,
            hysteresis=config.hysteresis,
        )
    )


def _kept_on_host(scaler: MegatronGradScaler) -> MegatronGradScaler:
    """A scaler with its numbers on the host, which alone reads them, several times a step."""
    for name, value in vars(scaler).items():
        if isinstance(value, Tensor):
            setattr(scaler, name, value.cpu())
    return scaler


def _can_fall(scaler: MegatronGradScaler | None) -> bool:
    """Whether gradients that are not finite make the scale of the loss smaller."""
    return isinstance(scaler, DynamicGradScaler) and float(scaler.scale) > float(scaler.min_scale)


def _settings(replica: ModuleReplica, config: AdamConfig) -> AdamConfig:
    """The run's settings, with what the module's family wants otherwise."""
    return replace(config, **(adapter_of(replica.config).optimizer(replica.config) or {}))


def _build(replica: ModuleReplica, config: AdamConfig) -> MegatronOptimizer | ShardedAdam:
    if replica.sharded is not None:
        return ShardedAdam(replica.sharded, config)
    dtype = replica.module.config.params_dtype
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        log_num_zeros_in_grad=config.log_num_zeros,
        # Not fp16: megatron-core would scale, and agree on the scale, for each module separately.
        bf16=dtype != torch.float32,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    # The agreement that this replaces stays within a stage; another may have no part that trains.
    with world_is(replica.groups.stage_hosts):
        optimizer = get_megatron_optimizer(
            optimizer_config,
            [replica.ddp],
            use_gloo_process_groups=False,
            pg_collection=replica.groups.pg_collection,
        )
    for group in optimizer.param_groups:
        # The schedule would set the run's weight decay; learning rates are in the group already.
        group["start_wd"] = group["end_wd"] = config.weight_decay
    return optimizer
