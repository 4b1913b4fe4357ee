"""The length of training and the learning-rate schedule from their flags.

Each length is given in iterations or in samples; here all of them become samples.
"""

from dataclasses import dataclass, replace

from megatron_mimo.config.loop_config import LengthConfig
from megatron_mimo.optim.config import ScheduleConfig, TailStyle

_TRAIN_ITERS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class _Length:
    """The length of a phase of training.

    Attributes:
        typed: Flag with the length, as it was typed.
        samples: Number of samples of the phase.
    """

    typed: str
    samples: int

    def __str__(self) -> str:
        """The flag, with its number of samples unless it is given in samples."""
        if self.typed.endswith(f" {self.samples}"):
            return self.typed
        return f"{self.typed} ({self.samples} samples)"


def fill_length(length: LengthConfig) -> LengthConfig:
    """The length of training, by default the default number of iterations."""
    if length.train_iters is None and length.train_samples is None:
        return replace(length, train_iters=_TRAIN_ITERS)
    return length


def fill_schedule(schedule: ScheduleConfig, length: LengthConfig) -> ScheduleConfig:
    """The flags with defaults that follow from others; one flag of each pair stays left out.

    Args:
        schedule: Flags as given.
        length: Filled length of training.
    """
    if schedule.warmup_iters is None and schedule.warmup_samples is None:
        schedule = replace(schedule, warmup_iters=0)
    if schedule.decay_iters is None and schedule.decay_samples is None:
        schedule = replace(
            schedule, decay_iters=length.train_iters, decay_samples=length.train_samples
        )
    return replace(schedule, wsd_decay_style=_tail_style(schedule))


def count_iterations(length: LengthConfig, global_batch_size: int) -> int:
    """Number of iterations to train: as given, or the whole global batches of the samples.

    Args:
        length: Filled length of training.
        global_batch_size: Number of samples per iteration.

    Raises:
        ValueError: The samples are fewer than a global batch.
    """
    train = _train(length, global_batch_size)
    if train.samples < global_batch_size:
        raise ValueError(
            f"{train} is below --global-batch-size {global_batch_size}: expected at least the "
            f"samples of one iteration"
        )
    return train.samples // global_batch_size


def in_samples(
    schedule: ScheduleConfig, length: LengthConfig, global_batch_size: int
) -> ScheduleConfig:
    """The schedule for the optimizer, with every length in samples.

    Args:
        schedule: Flags as given, so that errors name the flags that were typed.
        length: Filled length of training.
        global_batch_size: Number of samples per iteration.

    Raises:
        ValueError: The warm-up or the WSD tail does not fit into the decay; the message names the
            flags.
    """
    warmup = _length(
        "--lr-warmup", schedule.warmup_iters, schedule.warmup_samples, global_batch_size
    ) or _Length(typed="--lr-warmup-iters 0", samples=0)
    decay = _length(
        "--lr-decay", schedule.decay_iters, schedule.decay_samples, global_batch_size
    ) or _train(length, global_batch_size)
    tail = _length(
        "--lr-wsd-decay", schedule.wsd_decay_iters, schedule.wsd_decay_samples, global_batch_size
    )
    if warmup.samples >= decay.samples:
        raise ValueError(
            f"{warmup} is not below {decay}: expected less, as the warm-up is part of it"
        )
    room = decay.samples - warmup.samples
    if tail is not None and tail.samples > room:
        stretch = f"{decay} less {warmup}" if warmup.samples else f"{decay}"
        raise ValueError(
            f"{tail} is above {stretch}: expected at most {room} samples, as the tail begins "
            f"after the warm-up and ends with the decay"
        )
    return ScheduleConfig(
        style=schedule.style,
        warmup_samples=warmup.samples,
        decay_samples=decay.samples,
        wsd_decay_samples=None if tail is None else tail.samples,
        wsd_decay_style=_tail_style(schedule),
    )


def _tail_style(schedule: ScheduleConfig) -> TailStyle | None:
    if schedule.style == "WSD" and schedule.wsd_decay_style is None:
        return "exponential"
    return schedule.wsd_decay_style


def _train(length: LengthConfig, global_batch_size: int) -> _Length:
    found = _length("--train", length.train_iters, length.train_samples, global_batch_size)
    assert found is not None
    return found


def _length(
    stem: str, iterations: int | None, samples: int | None, global_batch_size: int
) -> _Length | None:
    """The flag of a pair that is given; None if neither is."""
    assert iterations is None or samples is None, f"{stem}-iters and {stem}-samples"
    if iterations is not None:
        return _Length(typed=f"{stem}-iters {iterations}", samples=iterations * global_batch_size)
    if samples is not None:
        return _Length(typed=f"{stem}-samples {samples}", samples=samples)
    return None
