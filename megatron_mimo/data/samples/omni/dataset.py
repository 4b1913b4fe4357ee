"""The dataset on disk: pictures, calls and videos with their questions, written and read back."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_mimo.data.reading.webdataset import read_shard
from megatron_mimo.data.samples.dataset_folder import write_split, write_whole
from megatron_mimo.data.samples.handwriting import (
    Handwriting,
    draw,
    load_handwriting,
    split_sources,
)
from megatron_mimo.data.samples.omni.motion import Mover, film, mp4
from megatron_mimo.data.samples.omni.questions import (
    Kind,
    Medium,
    OmniDigitsConfig,
    OmniSample,
    Split,
    plan_samples,
)
from megatron_mimo.data.samples.omni.tones import dial, flac

ENDINGS: Mapping[Medium, str] = {"image": "png", "audio": "flac", "video": "mp4"}
"""Ending of the files of each medium."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredQuestion:
    """The first question of a sample.

    Attributes:
        key: Key of the sample.
        kind: Kind of the question.
        question: Text of the question, with a placeholder for each file.
        answer: Text of the expected answer.
        files: Contents of its file of each medium that it has.
    """

    key: str
    kind: Kind
    question: str
    answer: str
    files: Mapping[Medium, bytes]


def write_omni_digits(
    out: str | Path, config: OmniDigitsConfig | None = None, *, overwrite: bool = False
) -> Path:
    """Write the dataset, ready for megatron-energon.

    It is written beside `out` and renamed when complete. The same config gives the same shards, as
    long as PyAV's libraries are the same.

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
    settings = config or OmniDigitsConfig()
    return write_whole(out, lambda folder: _write_shards(folder, settings), overwrite=overwrite)


def read_omni_digits(path: str | Path, split: Split) -> list[StoredQuestion]:
    """Every sample of a split, in stored order.

    Args:
        path: Path to a folder that `write_omni_digits` wrote.
        split: Name of the split.

    Raises:
        ValueError: The folder holds no such split.
    """
    shards = sorted((Path(path) / split).glob("*.tar"))
    if not shards:
        raise ValueError(
            f"{path} holds no shards of the {split} split of a dataset of digits that are shown, "
            f"dialled and move: write one with `megatron-mimo data omni-digits --out {path}`"
        )
    samples = []
    for shard in shards:
        for key, parts in read_shard(shard).items():
            text = json.loads(parts["json"])
            question, answer = (message["content"] for message in text["messages"][:2])
            samples.append(
                StoredQuestion(
                    key=key,
                    kind=text["kind"],
                    question=question,
                    answer=answer,
                    files={m: parts[ending] for m, ending in ENDINGS.items() if ending in parts},
                )
            )
    return samples


def _write_shards(folder: Path, config: OmniDigitsConfig) -> list[str]:
    handwriting = load_handwriting()
    train, val = split_sources(len(handwriting.labels), config.val_fraction, config.seed)
    shards = []
    splits: tuple[tuple[Split, list[int]], ...] = (("train", train), ("val", val))
    for split, sources in splits:
        rng = np.random.default_rng([config.seed, 3 if split == "train" else 4])
        plan = plan_samples(split, sources, handwriting.labels, config)
        files = (
            (f"{split}-{i:06d}", _files(sample, handwriting, rng)) for i, sample in enumerate(plan)
        )
        shards += write_split(folder, split, files)
    return shards


def _files(
    sample: OmniSample, handwriting: Handwriting, rng: np.random.Generator
) -> dict[str, bytes]:
    files = {}
    if sample.shown is not None:
        picture = io.BytesIO()
        draw([handwriting.glyphs[sample.shown.source]], rng).save(picture, "PNG")
        files[ENDINGS["image"]] = picture.getvalue()
    if sample.dialled is not None:
        files[ENDINGS["audio"]] = flac(dial(sample.dialled, rng))
    if sample.moving:
        movers = [
            Mover(glyph=handwriting.glyphs[moving.source], towards=moving.towards)
            for moving in sample.moving
        ]
        files[ENDINGS["video"]] = mp4(film(movers, rng))
    return {**files, "json": json.dumps(_text(sample)).encode()}


def _text(sample: OmniSample) -> dict[str, object]:
    """A sample's JSON: a conversation in the form of chat models, and what its files show."""
    before = "".join(f"<{medium}>" for medium in sample.media)
    messages = []
    for asked in sample.asked:
        messages += [
            {"role": "user", "content": before + asked.question},
            {"role": "assistant", "content": asked.answer},
        ]
        before = ""
    facts = asdict(sample)
    del facts["asked"]
    return {"messages": messages, **facts}
