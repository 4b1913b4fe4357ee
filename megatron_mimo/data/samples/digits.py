"""A small real dataset: handwritten digits side by side, with questions about them.

The handwritten digits are split before anything is drawn, so that none of them is in both splits.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_mimo.data.inputs import ENCODER, Inputs
from megatron_mimo.data.reading.webdataset import read_shard
from megatron_mimo.data.samples.dataset_folder import write_split, write_whole
from megatron_mimo.data.samples.handwriting import draw, load_handwriting, split_sources
from megatron_mimo.data.samples.sample import RawSample
from megatron_mimo.data.text.clean import MalformedError
from megatron_mimo.data.text.conversation import parse_conversation, parse_json
from megatron_mimo.media.images import ImageInput
from megatron_mimo.settings import Within, check_bounds
from megatron_mimo.settings.ranges import MOST_SEED

Split = Literal["train", "val"]
Kind = Literal["single", "list", "count", "leftmost", "rightmost"]

_QUESTIONS: dict[Kind, str] = {
    "single": "Which digit is this?",
    "list": "Which digits?",
    "count": "How many digits?",
    "leftmost": "Leftmost digit?",
    "rightmost": "Rightmost digit?",
}
KINDS: tuple[Kind, ...] = tuple(_QUESTIONS)
"""Every kind of question."""
_SEVERAL: tuple[Kind, ...] = ("list", "count", "leftmost", "rightmost")
_PLACEHOLDER = "<image>"
_MOST_DIGITS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitsConfig:
    """Settings of the dataset to write.

    Attributes:
        num_train: Number of samples of the train split.
        num_val: Number of samples of the val split; the first ones show each held-out digit alone.
        val_fraction: Fraction of the handwritten digits that is held out, 0 to 1.
        single_fraction: Fraction of the train samples that show one digit and ask for it, 0 to 1.
        seed: Seed of the split and of all random choices.
    """

    num_train: Annotated[int, Within(1, 10_000_000)] = 12_000
    num_val: Annotated[int, Within(1, 10_000_000)] = 1_000
    val_fraction: Annotated[float, Within(0.001, 0.999)] = 0.2
    single_fraction: Annotated[float, Within(0, 1)] = 0.5
    seed: Annotated[int, Within(0, MOST_SEED)] = 1234

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitsSample:
    """The text of one sample, as in its JSON file.

    Attributes:
        question: Text of the question, with the image's placeholder.
        answer: Text of the expected answer.
        kind: Kind of the question.
        digits: Digits in the image, from left to right.
        sources: Indices of these digits among the 1,797 handwritten ones.
    """

    question: str
    answer: str
    kind: Kind
    digits: tuple[int, ...]
    sources: tuple[int, ...]


def plan_samples(
    split: Split, sources: Sequence[int], labels: Sequence[int], config: DigitsConfig
) -> Iterator[DigitsSample]:
    """Choose digits and questions of a split, a function of the seed alone.

    Args:
        split: Name of the split: "val" begins with every source alone, in order; "train" mixes all
            kinds.
        sources: Indices of the handwritten digits of this split.
        labels: Digit of every handwritten image.
        config: Numbers of samples and seed.
    """
    rng = np.random.default_rng([config.seed, 1 if split == "train" else 2])
    count = config.num_train if split == "train" else config.num_val
    for index in range(count):
        kind: Kind = "single"
        if split == "val" and index < len(sources):
            chosen = [sources[index]]
        elif split == "train" and rng.random() < config.single_fraction:
            chosen = [sources[int(rng.integers(len(sources)))]]
        else:
            kind = _SEVERAL[int(rng.integers(len(_SEVERAL)))]
            length = int(rng.integers(1, _MOST_DIGITS + 1))
            chosen = [sources[i] for i in rng.integers(len(sources), size=length).tolist()]
        digits = tuple(int(labels[source]) for source in chosen)
        yield DigitsSample(
            question=_PLACEHOLDER + _QUESTIONS[kind],
            answer=_answer(kind, digits),
            kind=kind,
            digits=digits,
            sources=tuple(chosen),
        )


def _answer(kind: Kind, digits: tuple[int, ...]) -> str:
    match kind:
        case "single" | "leftmost":
            return str(digits[0])
        case "rightmost":
            return str(digits[-1])
        case "count":
            return str(len(digits))
        case "list":
            return " ".join(map(str, digits))


def write_digits_dataset(
    out: str | Path, config: DigitsConfig | None = None, *, overwrite: bool = False
) -> Path:
    """Write the dataset, ready for megatron-energon.

    It is written beside `out` and renamed when complete. The same config gives the same shards.

    Args:
        out: Path to the folder to create.
        config: Settings of the dataset; None for the defaults.
        overwrite: Whether to replace an existing folder.

    Returns:
        The path to the folder.

    Raises:
        ValueError: `out` is a file, or a folder that is not empty and `overwrite` is off, or
            scikit-learn is missing.
    """
    settings = config or DigitsConfig()
    return write_whole(out, lambda folder: _write_shards(folder, settings), overwrite=overwrite)


def read_digits_split(path: str | Path, split: Split, kind: Kind | None = None) -> list[RawSample]:
    """Every sample of a split, or those of one kind, in stored order.

    Args:
        path: Path to a folder that `write_digits_dataset` wrote.
        split: Name of the split.
        kind: Kind of question of the samples to return; None for all.

    Raises:
        ValueError: The folder holds no such split, or a text in it cannot be read.
    """
    inputs: Inputs = {ENCODER: ImageInput()}
    shards = sorted((Path(path) / split).glob("*.tar"))
    if not shards:
        raise ValueError(
            f"{path} holds no shards of a digits dataset's {split} split: write one with "
            f"`megatron-mimo data digits --out {path}`"
        )
    samples = []
    for shard in shards:
        for key, parts in read_shard(shard).items():
            source = f"dataset {path}, shard {split}/{shard.name}"
            try:
                text = parse_json(parts["json"])
                turns = parse_conversation(text, inputs, {ENCODER: 1}).turns
            except (MalformedError, ValueError) as error:
                raise ValueError(f"sample {key!r} of {source}: {error}") from error
            assert isinstance(text, dict)
            if kind is None or text.get("kind") == kind:
                samples.append(
                    RawSample(key=key, turns=turns, items={ENCODER: (parts["png"],)}, source=source)
                )
    return samples


def _write_shards(folder: Path, config: DigitsConfig) -> list[str]:
    handwriting = load_handwriting()
    train, val = split_sources(len(handwriting.labels), config.val_fraction, config.seed)
    shards = []
    splits: tuple[tuple[Split, list[int]], ...] = (("train", train), ("val", val))
    for split, sources in splits:
        rng = np.random.default_rng([config.seed, 3 if split == "train" else 4])
        plan = plan_samples(split, sources, handwriting.labels, config)
        files = (
            (f"{split}-{i:06d}", _files(sample, handwriting.glyphs, rng))
            for i, sample in enumerate(plan)
        )
        shards += write_split(folder, split, files)
    return shards


def _files(
    sample: DigitsSample, glyphs: NDArray[np.float64], rng: np.random.Generator
) -> dict[str, bytes]:
    picture = io.BytesIO()
    draw([glyphs[source] for source in sample.sources], rng).save(picture, "PNG")
    return {"png": picture.getvalue(), "json": json.dumps(asdict(sample)).encode()}
