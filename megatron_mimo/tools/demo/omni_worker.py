"""Program of each rank of the demo with three kinds of media: training, then held-out questions."""

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_mimo.data import RawSample
from megatron_mimo.data.inputs import ENCODER
from megatron_mimo.data.samples.omni.dataset import StoredQuestion, read_omni_digits
from megatron_mimo.data.samples.omni.questions import KINDS, Medium
from megatron_mimo.tools.demo.asking import ask, write_report
from megatron_mimo.training.main import main

if TYPE_CHECKING:
    from megatron_mimo.training.loop import TrainResult
    from megatron_mimo.training.setup import Trainer

# By name: this module runs as `__main__`.
_logger = logging.getLogger("megatron_mimo.tools.demo.omni_worker")
_SWAP_SEED = 0
_POSITIONS = 80  # The longest sample has fewer.
_KIND_OF_ITEMS: Mapping[Medium, str] = {"image": ENCODER, "audio": "audio", "video": "video"}


def swapped(questions: Sequence[StoredQuestion], medium: Medium) -> list[StoredQuestion]:
    """Give each question the file of another one; everything else stays.

    Args:
        questions: Questions of one kind, which all have a file of the medium.
        medium: Medium of the files that change places.
    """
    order = np.random.default_rng(_SWAP_SEED).permutation(len(questions)).tolist()
    # Along a circle: no file stays where it is.
    giver = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    return [
        dataclasses.replace(
            question, files={**question.files, medium: questions[giver[index]].files[medium]}
        )
        for index, question in enumerate(questions)
    ]


def as_samples(questions: Sequence[StoredQuestion]) -> list[RawSample]:
    """Questions as the loader takes them."""
    return [
        RawSample.asking(
            key=question.key,
            question=question.question,
            answer=question.answer,
            items={_KIND_OF_ITEMS[medium]: (file,) for medium, file in question.files.items()},
        )
        for question in questions
    ]


def answer_held_out(trainer: "Trainer", result: "TrainResult") -> None:
    """Answer the held-out questions, then again with the files of each medium swapped."""
    path = trainer.data.path
    assert path is not None
    questions = read_omni_digits(path, "val")
    by_kind = {kind: [q for q in questions if q.kind == kind] for kind in KINDS}
    times = {kind: 1 + len(facts.chances) for kind, facts in KINDS.items()}
    count = sum(times[question.kind] for question in questions)
    _logger.info("asking %d questions about digits that it has not seen", count)
    answers: dict[str, str] = {}
    others: dict[Medium, dict[str, str]] = {medium: {} for medium in _KIND_OF_ITEMS}
    for kind, of_kind in by_kind.items():
        if not of_kind:
            continue
        answers |= ask(trainer, as_samples(of_kind), seq_length=_POSITIONS)
        for medium in KINDS[kind].chances:
            others[medium] |= ask(
                trainer, as_samples(swapped(of_kind, medium)), seq_length=_POSITIONS
            )
    write_report(trainer, result, {"answers": answers, "swapped": others})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], after=answer_held_out))
