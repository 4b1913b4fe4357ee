"""Flags of the optimizer, of its learning-rate schedule and of the loss scale."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import DisallowNone, arg

from megatron_mimo.settings import (
    AtLeast,
    Derived,
    InsteadOf,
    MoreThan,
    Number,
    OnlyWith,
    Real,
    Switch,
    Within,
    check_bounds,
    named,
)
from megatron_mimo.settings.ranges import MOST_ITERATIONS, MOST_SAMPLES

TailStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]
# Largest scale of a loss: its product with a loss is finite in float32.
_SCALE = 1e30
_FP16 = OnlyWith("--fp16")
_WSD = OnlyWith("--lr-decay-style WSD")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossScaleConfig:
    """Factor of the losses that keeps float16 gradients from vanishing.

    Attributes:
        constant: Fixed scale of the loss in float16; left out: the scale adapts.
        initial: First scale of the loss in float16.
        least: Smallest scale of the loss in float16.
        window: Number of updates in a row with finite gradients after which the scale doubles.
        hysteresis: Number of updates with gradients that are not finite after which the scale
            halves.
    """

    constant: Annotated[Real, named("--loss-scale"), MoreThan(0, _SCALE), _FP16] = None
    initial: Annotated[float, named("--initial-loss-scale"), MoreThan(0, _SCALE), _FP16] = 2.0**32
    least: Annotated[float, named("--min-loss-scale"), MoreThan(0, _SCALE), _FP16] = 1.0
    window: Annotated[int, named("--loss-scale-window"), Within(1, MOST_ITERATIONS), _FP16] = 1000
    hysteresis: Annotated[int, Within(1, MOST_ITERATIONS), _FP16] = 2

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.least > self.initial:
            raise ValueError(
                f"--min-loss-scale {self.least} is above --initial-loss-scale {self.initial}: "
                f"expected at most the first scale"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamConfig:
    """AdamW and gradient clipping, one setting for every module.

    Attributes:
        lr: Peak learning rate.
        min_lr: Floor of the learning rate; a constant schedule has none.
        weight_decay: Decoupled weight decay of matrices; vectors have none.
        beta1: Decay of Adam's first moment.
        beta2: Decay of Adam's second moment.
        eps: Number that is added to the square root of Adam's second moment.
        clip_grad: Largest global gradient norm; 0 turns clipping off.
        log_num_zeros: Whether to count the zeros in the gradients, and log them.
        correct_participation: Whether to scale a source's gradients by its data-parallel size over
            the number of its replicas with an item in the global batch. Without this flag they are
            exact already: sums over tokens, divided once.
        loss_scale: Scale of losses in float16; None: 1. It follows from --fp16.
    """

    lr: Annotated[float, Within(0, 10)] = 1e-4
    min_lr: Annotated[float, Within(0, 10)] = 0.0
    weight_decay: Annotated[float, Within(0, 10)] = 0.01
    beta1: Annotated[float, named("--adam-beta1"), AtLeast(0, below=1)] = 0.9
    beta2: Annotated[float, named("--adam-beta2"), AtLeast(0, below=1)] = 0.999
    eps: Annotated[float, named("--adam-eps"), Within(1e-30, 1)] = 1e-8
    clip_grad: Annotated[float, Within(0, 1e9)] = 1.0
    log_num_zeros: Annotated[Switch, named("--log-num-zeros-in-grad")] = False
    correct_participation: Annotated[
        Switch, named("--correct-encoder-grad-for-partial-participation")
    ] = False
    loss_scale: Derived[LossScaleConfig | None] = None

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.min_lr > self.lr:
            raise ValueError(
                f"--min-lr {self.min_lr} is above --lr {self.lr}: expected at most the peak"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over the run. Each length is in iterations or in samples.

    The optimizer counts samples: `megatron_mimo.config.learning_rate.in_samples` makes the schedule
    that it reads.

    Attributes:
        style: Course of the learning rate after the warm-up. WSD stays at the peak until its tail;
            inverse-square-root falls from where the warm-up ends.
        warmup_iters: Number of iterations of linear warm-up from 0; left out: none.
        warmup_samples: Number of samples of linear warm-up from 0.
        decay_iters: Number of iterations, warm-up included, after which the learning rate stays at
            the floor; left out: as long as training. A constant schedule has no floor.
        decay_samples: Number of samples, warm-up included, after which the learning rate stays at
            the floor.
        wsd_decay_iters: Number of iterations of WSD's tail, the last ones of the decay.
        wsd_decay_samples: Number of samples of WSD's tail, the last ones of the decay.
        wsd_decay_style: Course of WSD's tail; left out: exponential.
    """

    style: Annotated[
        Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"],
        named("--lr-decay-style"),
    ] = "linear"
    warmup_iters: Annotated[Number, named("--lr-warmup-iters"), Within(0, MOST_ITERATIONS)] = None
    warmup_samples: Annotated[
        Number,
        named("--lr-warmup-samples"),
        Within(0, MOST_SAMPLES),
        InsteadOf("--lr-warmup-iters"),
    ] = None
    decay_iters: Annotated[Number, named("--lr-decay-iters"), Within(1, MOST_ITERATIONS)] = None
    decay_samples: Annotated[
        Number,
        named("--lr-decay-samples"),
        Within(1, MOST_SAMPLES),
        InsteadOf("--lr-decay-iters"),
    ] = None
    wsd_decay_iters: Annotated[
        Number, named("--lr-wsd-decay-iters"), Within(1, MOST_ITERATIONS), _WSD
    ] = None
    wsd_decay_samples: Annotated[
        Number,
        named("--lr-wsd-decay-samples"),
        Within(1, MOST_SAMPLES),
        _WSD,
        InsteadOf("--lr-wsd-decay-iters"),
    ] = None
    wsd_decay_style: Annotated[
        DisallowNone[TailStyle | None],
        arg(help_behavior_hint=""),
        named("--lr-wsd-decay-style"),
        _WSD,
    ] = None

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.style == "WSD" and (self.wsd_decay_iters, self.wsd_decay_samples) == (None, None):
            raise ValueError(
                "--lr-decay-style WSD without the length of its tail: add --lr-wsd-decay-iters or "
                "--lr-wsd-decay-samples"
            )
        if self.style == "inverse-square-root" and not (self.warmup_iters or self.warmup_samples):
            raise ValueError(
                "--lr-decay-style inverse-square-root without a warm-up, from whose end it falls: "
                "add --lr-warmup-iters or --lr-warmup-samples"
            )
