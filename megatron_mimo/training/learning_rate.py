"""The length of training and the learning-rate schedule from their flags.

Each length is given in iterations or in samples; here all of them become samples.
"""

from dataclasses import dataclass, replace

from megatron_mimo.optim.config import ScheduleConfig
from megatron_mimo.training.config import TrainingSection

_TRAIN_ITERS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class _Length:
    """A stretch of training.

    Attributes:
        typed: As its author typed it.
        samples: How long it is.
    """

    typed: str
    samples: int

    def __str__(self) -> str:
        """The flag, with its samples unless it counts them itself."""
        if self.typed.endswith(f" {self.samples}"):
            return self.typed
        return f"{self.typed} ({self.samples} samples)"


def fill_schedule(training: TrainingSection) -> TrainingSection:
    """The flags with the defaults that follow from others; of each pair one stays left out."""
    if training.train_iters is None and training.train_samples is None:
        training = replace(training, train_iters=_TRAIN_ITERS)
    if training.lr_warmup_iters is None and training.lr_warmup_samples is None:
        training = replace(training, lr_warmup_iters=0)
    if training.lr_decay_iters is None and training.lr_decay_samples is None:
        training = replace(
            training, lr_decay_iters=training.train_iters, lr_decay_samples=training.train_samples
        )
    if training.lr_decay_style == "WSD" and training.lr_wsd_decay_style is None:
        training = replace(training, lr_wsd_decay_style="exponential")
    return training


def count_iterations(training: TrainingSection, global_batch_size: int) -> int:
    """Iterations to train: as given, or the whole global batches among the samples.

    Args:
        training: Filled flags.
        global_batch_size: Samples per iteration.

    Raises:
        ValueError: The samples are fewer than a global batch.
    """
    length = _train(training, global_batch_size)
    if length.samples < global_batch_size:
        raise ValueError(
            f"{length} is below --global-batch-size {global_batch_size}: expected at least the "
            f"samples of one iteration"
        )
    return length.samples // global_batch_size


def build_schedule(training: TrainingSection, global_batch_size: int) -> ScheduleConfig:
    """The schedule in samples.

    Args:
        training: Flags as given, so that errors name the flags that were typed.
        global_batch_size: Samples per iteration.

    Raises:
        ValueError: The warm-up or the WSD tail does not fit into the decay; names the flags.
    """
    filled = fill_schedule(training)
    warmup = _length(
        "--lr-warmup", filled.lr_warmup_iters, filled.lr_warmup_samples, global_batch_size
    )
    decay = _length(
        "--lr-decay", training.lr_decay_iters, training.lr_decay_samples, global_batch_size
    )
    decay = decay or _train(filled, global_batch_size)
    tail = _length(
        "--lr-wsd-decay",
        training.lr_wsd_decay_iters,
        training.lr_wsd_decay_samples,
        global_batch_size,
    )
    assert warmup is not None
    if warmup.samples >= decay.samples:
        raise ValueError(
            f"{warmup} is not below {decay}: expected less, as the warm-up is part of it"
        )
    room = decay.samples - warmup.samples
    if tail is not None and tail.samples > room:
        stretch = f"{decay} less {warmup}" if warmup.samples else f"{decay}"
        raise ValueError(
            f"{tail} is above {stretch}: expected at most {room} samples, as the tail begins "
            f"behind the warm-up and ends with the decay"
        )
    return ScheduleConfig(
        style=filled.lr_decay_style,
        warmup_samples=warmup.samples,
        decay_samples=decay.samples,
        wsd_decay_samples=None if tail is None else tail.samples,
        wsd_decay_style=filled.lr_wsd_decay_style,
    )


def _train(filled: TrainingSection, global_batch_size: int) -> _Length:
    found = _length("--train", filled.train_iters, filled.train_samples, global_batch_size)
    assert found is not None
    return found


def _length(
    stem: str, iterations: int | None, samples: int | None, global_batch_size: int
) -> _Length | None:
    """The one of a pair of flags that is given."""
    assert iterations is None or samples is None, f"{stem}-iters and {stem}-samples"
    if iterations is not None:
        return _Length(typed=f"{stem}-iters {iterations}", samples=iterations * global_batch_size)
    if samples is not None:
        return _Length(typed=f"{stem}-samples {samples}", samples=samples)
    return None
