"""What each rank of the demo runs: training, then answers to held-out questions."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_mimo.data import RawSample
from megatron_mimo.data.digits import read_digits_split
from megatron_mimo.training.main import main

if TYPE_CHECKING:
    from megatron_mimo.training.loop import TrainResult
    from megatron_mimo.training.setup import Trainer

# Where the logging rank writes; the parent process names it, as the flags are those of training.
ANSWERS_VARIABLE = "MIMO_DEMO_ANSWERS"
_SHUFFLE_SEED = 0


def shuffle_images(samples: Sequence[RawSample]) -> list[RawSample]:
    """Give each question the images of another sample; keys, questions and answers stay."""
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(samples))
    return [
        dataclasses.replace(sample, images=samples[other].images)
        for sample, other in zip(samples, order, strict=True)
    ]


def answer_held_out(trainer: "Trainer", result: "TrainResult") -> None:
    """Answer the held-out single digits, seen and with shuffled images, and some of every kind."""
    # It imports megatron-core, which training has prepared by now.
    from megatron_mimo.training.exact_match import write_answers

    path = trainer.data.path
    assert path is not None
    single = read_digits_split(path, "val", kind="single")
    mixed = read_digits_split(path, "val")
    asked = {
        "single": single,
        "single_shuffled_images": shuffle_images(single),
        "mixed": mixed,
    }
    report: dict[str, object] = {
        "train_seconds": result.train_seconds,
        "final_lm_loss": result.lm_loss,
        "world_size": trainer.engine.topology.layout.world_size,
    }
    for name, samples in asked.items():
        answers = write_answers(
            trainer.engine, samples, trainer.data, trainer.role, trainer.tokenizer
        )
        if answers is not None:
            report[name] = {
                key: trainer.tokenizer.decode(list(answer.generated))
                for key, answer in answers.items()
            }
    if trainer.engine.topology.is_logging_rank:
        Path(os.environ[ANSWERS_VARIABLE]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], after=answer_held_out))
