"""A small real dataset: handwritten digits side by side, with questions about them.

The digits are scikit-learn's copy of the UCI test set "Optical Recognition of Handwritten Digits",
1,797 images of 8 x 8 pixels. They are split before anything is drawn, so that no handwritten digit
is in both splits.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_mimo.data.inputs import ENCODER, Inputs
from megatron_mimo.data.reading.webdataset import prepare, read_shard, write_shard
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
_SHARD_SIZE = 1000


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


def split_sources(num_sources: int, val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the handwritten digits of the train and of the val split, each ascending."""
    num_val = min(num_sources - 1, max(1, round(num_sources * val_fraction)))
    order = np.random.default_rng([seed, 0]).permutation(num_sources)
    return sorted(order[num_val:].tolist()), sorted(order[:num_val].tolist())


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


def draw(glyphs: Sequence[NDArray[np.float64]], rng: np.random.Generator) -> Image.Image:
    """Draw handwritten digits side by side, light on dark, at a random size.

    Args:
        glyphs: Images of digits, [8, 8] each, 0 (paper) to 16 (ink).
        rng: Random generator of sizes, gaps, margins and brightness.

    Returns:
        Image in mode L, 24 to 40 pixels high (to 36 with three digits or more), with up to two more
        pixels on each side.
    """
    height = int(rng.integers(24, 41 if len(glyphs) < 3 else 37))
    brightness = rng.uniform(0.7, 1.0)
    left, top, right, bottom = (int(m) for m in rng.integers(0, 3, size=4))
    pictures = []
    for glyph in glyphs:
        width = max(8, round(height * rng.uniform(0.8, 1.2)))
        ink = Image.fromarray((glyph * (brightness * 255 / 16)).astype(np.uint8), mode="L")
        pictures.append(ink.resize((width, height), Image.Resampling.BICUBIC))
    gaps = rng.integers(0, 4, size=len(pictures)).tolist()
    width = left + right + sum(p.width for p in pictures) + sum(gaps[1:])
    canvas = Image.new("L", (width, top + height + bottom))
    x = left - gaps[0]
    for picture, gap in zip(pictures, gaps, strict=True):
        x += gap
        canvas.paste(picture, (x, top))
        x += picture.width
    return canvas


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
    config = config or DigitsConfig()
    target = Path(out)
    _refuse_to_clobber(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        shards = _write_shards(building, config)
        prepare(building, shards)
        _replace(target, building)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return target


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


def _refuse_to_clobber(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"--out {target} is a file: expected a folder to make")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(
            f"--out {target} is not empty: name another folder, or pass --overwrite to replace it"
        )


def _replace(target: Path, building: Path) -> None:
    """Replace the target by the finished folder, so that it is never incomplete."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    building.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _write_shards(folder: Path, config: DigitsConfig) -> list[str]:
    # scikit-learn takes a second to import; only writing needs it.
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ValueError(
            "the handwritten digits are scikit-learn's, which is not installed: run `pip install "
            "scikit-learn`, or install this package with its extra demo"
        ) from error

    bundled = load_digits()
    glyphs, labels = bundled.images, bundled.target.tolist()
    train, val = split_sources(len(labels), config.val_fraction, config.seed)
    shards = []
    splits: tuple[tuple[Split, list[int]], ...] = (("train", train), ("val", val))
    for split, sources in splits:
        (folder / split).mkdir()
        rng = np.random.default_rng([config.seed, 3 if split == "train" else 4])
        plan = list(plan_samples(split, sources, labels, config))
        for start in range(0, len(plan), _SHARD_SIZE):
            shards.append(f"{split}/{start // _SHARD_SIZE:06d}.tar")
            chunk = plan[start : start + _SHARD_SIZE]
            write_shard(
                folder / shards[-1],
                (
                    (f"{split}-{i:06d}", _files(sample, glyphs, rng))
                    for i, sample in enumerate(chunk, start)
                ),
            )
    return shards


def _files(
    sample: DigitsSample, glyphs: NDArray[np.float64], rng: np.random.Generator
) -> dict[str, bytes]:
    picture = io.BytesIO()
    draw([glyphs[source] for source in sample.sources], rng).save(picture, "PNG")
    return {"png": picture.getvalue(), "json": json.dumps(asdict(sample)).encode()}
