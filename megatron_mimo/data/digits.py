"""A real dataset to try things on: handwritten digits side by side, with questions about them.

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
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_mimo.data.sample import RawSample
from megatron_mimo.data.webdataset import prepare, read_shard, write_shard

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
    """What to write.

    Attributes:
        num_train: Samples of the train split.
        num_val: Samples of the val split; the first ones show each held-out digit alone.
        val_fraction: Part of the handwritten digits that is held out.
        single_fraction: Part of the train samples that show one digit and ask for it.
        seed: Of the split and of everything drawn.
    """

    num_train: int = 12_000
    num_val: int = 1_000
    val_fraction: float = 0.2
    single_fraction: float = 0.5
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, value in (("--num-train", self.num_train), ("--num-val", self.num_val)):
            if value < 1:
                raise ValueError(f"{name} is {value}: expected at least 1 sample")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val-fraction is {self.val_fraction}: expected between 0 and 1")
        if not 0 <= self.single_fraction <= 1:
            raise ValueError(f"--single-fraction is {self.single_fraction}: expected 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitsSample:
    """The text of one sample, as its JSON file holds it.

    Attributes:
        question: With the image's placeholder.
        answer: What to write.
        kind: Which question.
        digits: The digits in the image, left to right.
        sources: Their indices among the 1,797 handwritten ones.
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
        split: "val" begins with every source alone, in order; "train" mixes all kinds.
        sources: Handwritten digits of this split.
        labels: Digit of every handwritten one.
        config: Numbers and seed.
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
        glyphs: [8, 8] each, 0 (paper) to 16 (ink).
        rng: Source of sizes, gaps, margins and brightness.

    Returns:
        Mode L, 24 to 40 pixels high (to 36 with three digits or more), up to two more on each side.
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
        out: Folder to make.
        config: What to write.
        overwrite: Replace what is there.

    Returns:
        The folder.

    Raises:
        ValueError: `out` is a file, or a folder with something in it and `overwrite` is off.
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
        path: Folder that `write_digits_dataset` wrote.
        split: Which.
        kind: Only samples with this question.

    Raises:
        ValueError: The folder holds no such split.
    """
    shards = sorted((Path(path) / split).glob("*.tar"))
    if not shards:
        raise ValueError(
            f"{path} holds no shards of a digits dataset's {split} split: write one with "
            f"`megatron-mimo data digits --out {path}`"
        )
    samples = []
    for shard in shards:
        for key, parts in read_shard(shard).items():
            text = json.loads(parts["json"])
            if kind is None or text["kind"] == kind:
                samples.append(
                    RawSample.asking(
                        key=key,
                        question=text["question"],
                        answer=text["answer"],
                        images=(parts["png"],),
                        source=f"dataset {path}, shard {split}/{shard.name}",
                    )
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
    """Put the finished folder in place of what is there; never a half-written one."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    building.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _write_shards(folder: Path, config: DigitsConfig) -> list[str]:
    # scikit-learn takes a second to import; only writing needs it.
    from sklearn.datasets import load_digits

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
