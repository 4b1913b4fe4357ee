"""Weights of whole models between their folders of transformers and the modules of a run."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn

from megatron_mimo.modules.hf.config import describe
from megatron_mimo.modules.hf.weights import exported, fill
from megatron_mimo.weights.folder import WeightFolder, copy_beside, write_folder
from megatron_mimo.weights.load import Place


class Stage(Protocol):
    """A stage of a model of transformers, `modules.hf.encoder.HfEncoder` or `HfLanguage`."""

    @property
    def model(self) -> nn.Module:
        """The part of the model that the stage holds, with its names in the whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Positions of a rank among those that share weights with it.

    Attributes:
        tp: Position among the ranks that share a weight.
        ep: Position among the ranks that experts are distributed over.
    """

    tp: Place = (0, 1)
    ep: Place = (0, 1)


def load_hf(folder: WeightFolder, stages: Iterable[tuple[Stage, Places]]) -> None:
    """Fill the stages that this rank holds; it reads only its own shards of the weights.

    Not collective. An optimizer that keeps copies of the weights is made after it.

    Args:
        folder: Folder of the whole model.
        stages: Stages on this rank, each with its positions in its grid.

    Raises:
        ValueError: Weights are missing, unexpected or of another shape; the message lists them.
    """
    description = describe(folder.config)
    for stage, places in stages:
        fill(stage.model, folder, description, tp=places.tp, ep=places.ep)


def save_hf(path: str | Path, source: WeightFolder, stages: Iterable[Stage]) -> None:
    """Write a folder that transformers loads, from modules that one process holds whole.

    Everything beside trained weights is the source's: config.json, the files of processor,
    tokenizer, chat template and generation, the names and dtypes of weights, whether a tied head is
    stored, and parts that the model does not read. Weights that did not change are the same bit by
    bit.

    Args:
        path: Path to the folder to write; weights in it are replaced.
        source: Folder that training began from.
        stages: The modules; what none of them holds is the source's.

    Raises:
        ValueError: The source does not hold such a model.
    """
    copy_beside(source.path, Path(path))
    models = [stage.model for stage in stages]
    write_folder(path, source.config, exported(models, source, describe(source.config)))
