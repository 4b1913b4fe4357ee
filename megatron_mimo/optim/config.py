"""What the optimizer is told."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LossScaleConfig:
    """What losses are multiplied by, so that float16 gradients do not vanish.

    Attributes:
        constant: A fixed scale; None adapts it.
        initial: The first scale.
        least: It does not get smaller.
        window: Updates in a row after which it doubles.
        hysteresis: Updates with gradients that are not finite after which it halves.
    """

    constant: float | None = None
    initial: float = 2.0**32
    least: float = 1.0
    window: int = 1000
    hysteresis: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamConfig:
    """AdamW and gradient clipping, one setting for every module.

    Attributes:
        lr: Peak learning rate.
        min_lr: Floor of the schedule.
        weight_decay: Decoupled weight decay of matrices; vectors have none.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        clip_grad: Largest global gradient norm; 0 turns clipping off.
        log_num_zeros: Count the zeros in the gradients.
        loss_scale: Of losses in float16; None: 1.
    """

    lr: float
    min_lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    clip_grad: float
    log_num_zeros: bool = False
    loss_scale: LossScaleConfig | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over samples, as megatron-core's OptimizerParamScheduler has it.

    Attributes:
        style: "constant", "linear", "cosine", "inverse-square-root" or "WSD".
        warmup_samples: Linear warm-up from 0; below `decay_samples`.
        decay_samples: Samples, warm-up included, after which the floor holds.
        wsd_decay_samples: Length of WSD's tail, at most the decay without the warm-up; None with
            other styles.
        wsd_decay_style: "linear", "cosine", "exponential" or "minus_sqrt"; None with other styles.
    """

    style: str
    warmup_samples: int
    decay_samples: int
    wsd_decay_samples: int | None = None
    wsd_decay_style: str | None = None
