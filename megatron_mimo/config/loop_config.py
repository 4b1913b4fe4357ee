"""Flags of the training loop: how long it runs, when it stops early, when it evaluates.

They are defined here and not beside the loop, because the training package imports this one.
"""

from dataclasses import dataclass
from typing import Annotated

from megatron_mimo.settings import InsteadOf, Number, Real, Within
from megatron_mimo.settings.ranges import MOST_ITERATIONS, MOST_SAMPLES


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthConfig:
    """Length of training.

    Attributes:
        train_iters: Number of iterations to train; left out, and without --train-samples: 100.
        train_samples: Number of samples to train on, instead of --train-iters; samples that do not
            fill a last global batch are left out.
    """

    train_iters: Annotated[Number, Within(1, MOST_ITERATIONS)] = None
    train_samples: Annotated[Number, Within(1, MOST_SAMPLES), InsteadOf("--train-iters")] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StopConfig:
    """Conditions that stop a run before its end.

    Attributes:
        exit_interval: Number of iterations; the run stops after the next iteration that is a
            multiple of it; left out: train to the end.
        exit_duration_in_mins: Number of minutes after which to save and stop, once the iteration is
            finished; left out: no limit.
        exit_signal_handler: Whether to save and stop after the iteration in which a rank gets
            SIGTERM or SIGUSR1; a second signal ends the run at once.
        max_nonfinite_steps: Number of steps in a row whose loss or gradients are not finite after
            which the run fails. None of them changes weights, and no checkpoint is saved among
            them. In float16 they count only once the loss scale cannot fall further.
    """

    exit_interval: Annotated[Number, Within(1, MOST_ITERATIONS)] = None
    exit_duration_in_mins: Annotated[Real, Within(0, 10_000_000)] = None
    exit_signal_handler: bool = True
    max_nonfinite_steps: Annotated[int, Within(1, MOST_ITERATIONS)] = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Times and length of evaluations.

    Attributes:
        eval_interval: Number of iterations between evaluations on the val split, with one more at
            the end; 0 for no evaluation.
        eval_iters: Number of global batches per evaluation.
    """

    eval_interval: Annotated[int, Within(0, MOST_ITERATIONS)] = 0
    eval_iters: Annotated[int, Within(1, MOST_ITERATIONS)] = 10
