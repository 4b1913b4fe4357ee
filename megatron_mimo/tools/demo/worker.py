"""Program of each rank of the demo: training, then answers to held-out questions."""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_mimo.data import RawSample
from megatron_mimo.data.samples.digits import KINDS, read_digits_split
from megatron_mimo.tools.demo.asking import ask, write_report
from megatron_mimo.training.main import main

if TYPE_CHECKING:
    from megatron_mimo.training.loop import TrainResult
    from megatron_mimo.training.setup import Trainer

# By name: this module runs as `__main__`.
_logger = logging.getLogger("megatron_mimo.tools.demo.worker")
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
    path = trainer.data.path
    assert path is not None
    # Kind by kind: most are answered by one token.
    kinds = {kind: read_digits_split(path, "val", kind=kind) for kind in KINDS}
    count = sum(map(len, kinds.values())) + len(kinds["single"])
    _logger.info("asking %d questions about images that it has not seen", count)
    answered = {
        key: text for samples in kinds.values() for key, text in ask(trainer, samples).items()
    }
    shuffled = ask(trainer, shuffle_images(kinds["single"]))
    write_report(trainer, result, {"answers": answered, "single_shuffled_images": shuffled})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], after=answer_held_out))
