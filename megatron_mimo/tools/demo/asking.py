"""What the ranks of a demo do after training: held-out questions to the model, and a report."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mimo.data import RawSample

if TYPE_CHECKING:
    from megatron_mimo.training.loop import TrainResult
    from megatron_mimo.training.setup import Trainer

ANSWERS_VARIABLE = "MIMO_DEMO_ANSWERS"
"""Environment variable with the file that the logging rank writes its report to; the flags are
those of training."""


def ask(
    trainer: "Trainer", samples: Sequence[RawSample], *, seq_length: int | None = None
) -> dict[str, str]:
    """Let the model answer; collective over the world.

    Answers are written at once for as many samples as fit, and those of a batch wait for the
    longest: ask for answers of one length.

    Args:
        trainer: The trained model on this rank.
        samples: Questions with unique keys; their answers are not shown to the model.
        seq_length: Number of positions for each of them; None for as many as a sequence of the run
            has, which are many in a run that packs several samples into one.

    Returns:
        Answers by key on the logging rank, nothing elsewhere.
    """
    # It imports megatron-core, which training has prepared by now.
    from megatron_mimo.training.exact_match import write_answers

    data = trainer.data
    if seq_length is not None:
        data = dataclasses.replace(data, seq_length=seq_length, packing_buffer_size=None)
    answers = write_answers(trainer.runner, samples, data, trainer.role, trainer.tokenizer)
    return {
        key: trainer.tokenizer.decode(list(answer.generated))
        for key, answer in (answers or {}).items()
    }


def write_report(trainer: "Trainer", result: "TrainResult", answers: Mapping[str, Any]) -> None:
    """Hand facts of the run and the answers to the process that started the ranks.

    Args:
        trainer: The trained model on this rank; only the logging rank writes.
        result: What training came to.
        answers: Further fields of the report.
    """
    if not trainer.runner.topology.is_logging_rank:
        return
    report = {
        "train_seconds": result.train_seconds,
        "final_lm_loss": result.lm_loss,
        "world_size": trainer.runner.topology.layout.world_size,
        **answers,
    }
    Path(os.environ[ANSWERS_VARIABLE]).write_text(json.dumps(report), encoding="utf-8")
