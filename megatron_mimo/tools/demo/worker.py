"""Program of each rank of the demo: training, then answers to held-out questions."""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_mimo.data import RawSample
from megatron_mimo.data.samples.digits import KINDS, read_digits_split
from megatron_mimo.training.main import main

if TYPE_CHECKING:
    from megatron_mimo.training.loop import TrainResult
    from megatron_mimo.training.setup import Trainer

# By name: this module runs as `__main__`.
_logger = logging.getLogger("megatron_mimo.tools.demo.worker")
# Where the logging rank writes; the parent process names it, as the flags are those of training.
ANSWERS_VARIABLE = "MIMO_DEMO_ANSWERS"
_SHUFFLE_SEED = 0


def shuffle_images(samples: Sequence[RawSample]) -> list[RawSample]:
    """Give each question the images of another sample; keys, questions and answers stay."""
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(samples))
    return [
        dataclasses.replace(sample, items=samples[other].items)
        for sample, other in zip(samples, order, strict=True)
    ]


def answer_held_out(trainer: "Trainer", result: "TrainResult") -> None:
    """Answer the held-out questions of every kind, and single digits also with shuffled images."""
    # It imports megatron-core, which training has prepared by now.
    from megatron_mimo.training.exact_match import write_answers

    path = trainer.data.path
    assert path is not None

    def ask(samples: Sequence[RawSample]) -> dict[str, str]:
        answers = write_answers(
            trainer.runner, samples, trainer.data, trainer.role, trainer.tokenizer
        )
        return {
            key: trainer.tokenizer.decode(list(answer.generated))
            for key, answer in (answers or {}).items()
        }

    # Kind by kind: most are answered by one token, and those of a batch wait for the longest.
    kinds = {kind: read_digits_split(path, "val", kind=kind) for kind in KINDS}
    count = sum(map(len, kinds.values())) + len(kinds["single"])
    _logger.info("asking %d questions about images that it has not seen", count)
    answered = {key: text for samples in kinds.values() for key, text in ask(samples).items()}
    report = {
        "train_seconds": result.train_seconds,
        "final_lm_loss": result.lm_loss,
        "world_size": trainer.runner.topology.layout.world_size,
        "answers": answered,
        "single_shuffled_images": ask(shuffle_images(kinds["single"])),
    }
    if trainer.runner.topology.is_logging_rank:
        Path(os.environ[ANSWERS_VARIABLE]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], after=answer_held_out))
