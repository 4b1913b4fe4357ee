"""One distributed optimizer per module, stepped as one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
from megatron_mimo.optim.config import AdamConfig, LossScaleConfig, ScheduleConfig
from megatron_mimo.optim.state import ParamState, param_states, set_step
from megatron_mimo.runtime.engine import world_is

# Position of each module in the vector that the world agrees on.
_MODULES = ("encoder", "llm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What an optimizer step did, the same on every rank.

    Attributes:
        applied: False when the gradients were not finite and nothing was changed.
        grad_norm: Global gradient norm over all modules, before clipping.
        module_norms: Gradient norm of each module; 0 for one that does not train.
        num_zeros: Zeros in the gradients of all modules; None when they are not counted.
        loss_scale: That the step's loss was multiplied by.
    """

    applied: bool
    grad_norm: float
    module_norms: Mapping[str, float]
    num_zeros: int | None
    loss_scale: float


class MimoOptimizer:
    """Chains one megatron-core distributed optimizer per module that trains on this rank.

    A module that is frozen has no optimizer and takes part in the agreement all the same.

    Args:
        model: The modules of this rank.
        config: AdamW and clipping.
        control: gloo group of the world.
    """

    def __init__(self, model: MimoModel, config: AdamConfig, control: dist.ProcessGroup) -> None:
        self._config = config
        self._control = control
        self._num_updates = 0
        self._scaler = _scaler(config.loss_scale)
        self._optimizers: dict[str, MegatronOptimizer] = {
            replica.groups.spec.name: _build(replica, config)
            for replica in model.replicas
            if replica.ddp is not None
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of every optimizer of this rank, for the scheduler."""
        return [group for o in self._optimizers.values() for group in o.param_groups]

    @property
    def loss_scale(self) -> float:
        """What the next loss is to be multiplied by; 1 unless parameters are float16."""
        return float(self._scaler.scale) if self._scaler is not None else 1.0

    @property
    def scaler_state(self) -> dict[str, Any]:
        """Of the loss scale; empty where it is 1."""
        return self._scaler.state_dict() if self._scaler is not None else {}

    @scaler_state.setter
    def scaler_state(self, state: dict[str, Any]) -> None:
        if self._scaler is not None and state:
            self._scaler.load_state_dict(state)

    @property
    def num_updates(self) -> int:
        """Updates made so far, which Adam's bias correction counts; equal on every rank."""
        return self._num_updates

    @num_updates.setter
    def num_updates(self, number: int) -> None:
        self._num_updates = number
        for optimizer in self._optimizers.values():
            set_step(optimizer, number)

    def param_states(self) -> dict[int, ParamState]:
        """What this rank owns of each weight's state, by the weight's address."""
        found: dict[int, ParamState] = {}
        for optimizer in self._optimizers.values():
            found |= param_states(optimizer)
        return found

    def refresh_main_params(self) -> None:
        """Copy the model's weights into the fp32 main parameters, after they were loaded alone.

        Without it the first update would step from where the weights were initialised.
        """
        for optimizer in self._optimizers.values():
            optimizer.reload_model_params()

    @torch.no_grad()
    def step(self) -> Update:
        """Clip by the one global norm and update every module.

        The gradients must be finalised. One reduction of a few numbers over the world, on the host,
        agrees on the norms; a stage without anything to train takes part in it like the others.
        """
        for optimizer in self._optimizers.values():
            # Without loss scaling this only moves gradients to the fp32 main parameters.
            optimizer.prepare_grads()
        norms, zeros = self._agree()
        total = math.sqrt(sum(norm * norm for norm in norms.values()))
        applied = math.isfinite(total)
        if applied:
            for optimizer in self._optimizers.values():
                if self._config.clip_grad > 0:
                    clip_grad_by_total_norm_fp32(
                        optimizer.get_parameters(), self._config.clip_grad, total
                    )
                optimizer.step_with_ready_grads()
            self._num_updates += 1
        scale = self.loss_scale
        if self._scaler is not None:
            # Of the agreement, so that the scale stays the same on every rank.
            self._scaler.update(not applied)
        return Update(
            applied=applied,
            grad_norm=total,
            module_norms=norms,
            num_zeros=sum(zeros) if self._config.log_num_zeros else None,
            loss_scale=scale,
        )

    def _agree(self) -> tuple[dict[str, float], list[int]]:
        """Norm and zero count of every module, on every rank.

        Optimizer shards hold every gradient of a module once, so squares and zeros just add up.
        """
        numbers = torch.zeros(2, len(_MODULES), dtype=torch.float64)
        for name, optimizer in self._optimizers.items():
            column = _MODULES.index(name)
            gradients = _own_gradients(optimizer)
            numbers[0, column] = _sum_of_squares(gradients)
            if self._config.log_num_zeros:
                numbers[1, column] = sum(int((grad == 0).sum()) for grad in gradients)
        dist.all_reduce(numbers, op=dist.ReduceOp.SUM, group=self._control)
        squares, zeros = numbers.tolist()
        # NaN survives a sum, but not a comparison of losses; infinity says the same.
        norms = [math.sqrt(s) if math.isfinite(s) else math.inf for s in squares]
        return dict(zip(_MODULES, norms, strict=True)), [int(count) for count in zeros]


def finalize_gradients(
    model: MimoModel,
    num_target_tokens: int,
    *,
    encoder_scale: float = 1.0,
    loss_scale: float = 1.0,
) -> None:
    """Sum each module's gradients over its own groups, then divide once.

    Args:
        model: The modules of this rank, after the backward of every microbatch.
        num_target_tokens: Of the global batch, over all lanes; at least 1.
        encoder_scale: Multiplies the encoder's gradients.
        loss_scale: That the losses were multiplied by.
    """
    for replica in model.replicas:
        if replica.ddp is not None:
            finalize_model_grads([replica.ddp], pg_collection=replica.groups.pg_collection)
            scale = encoder_scale if replica is model.encoder else 1.0
            replica.ddp.scale_gradients(scale / (num_target_tokens * loss_scale))


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


def _own_gradients(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Gradients that this rank alone counts: no copies of tensor-parallel peers or tied weights."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [grad for part in parts for grad in part.get_grads_for_grad_norm()]


def _sum_of_squares(gradients: list[Tensor]) -> float:
    """Of all elements; the only wait for the device, and in float64 past each tensor's norm."""
    if not gradients:
        return 0.0
    norms = torch.stack(torch._foreach_norm([grad.float() for grad in gradients]))
    return float(norms.double().square().sum())


def _scaler(config: LossScaleConfig | None) -> MegatronGradScaler | None:
    if config is None:
        return None
    if config.constant is not None:
        return ConstantGradScaler(config.constant)
    return DynamicGradScaler(
        initial_scale=config.initial,
        min_scale=config.least,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.window,
        hysteresis=config.hysteresis,
    )


def _build(replica: ModuleReplica, config: AdamConfig) -> MegatronOptimizer:
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
        # Not fp16: it would scale, and agree on it, for each module apart.
        bf16=dtype != torch.float32,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    # The agreement that this replaces stays within a stage: another may have nothing to train.
    with world_is(replica.groups.pg_collection.tp_dp_cp):
        return get_megatron_optimizer(
            optimizer_config,
            [replica.ddp],
            use_gloo_process_groups=False,
            pg_collection=replica.groups.pg_collection,
        )
