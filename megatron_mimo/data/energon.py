"""Samples from a dataset on disk, read with megatron-energon, one stream per lane.

A lane is one *rank* in energon's words: `WorkerConfig(rank=lane, world_size=num_lanes)`. Whoever
reads a lane, on whichever process, builds the same config and so gets the same samples in the same
order; no process group takes part.
"""

import gc
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.energon import (
    Cooker,
    Sample,
    TaskEncoder,
    WorkerConfig,
    edataclass,
    get_train_dataset,
    get_val_dataset,
    stateless,
)
from megatron.energon.epathlib import EPath
from megatron.energon.errors import reraise_exception
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.flavors.webdataset.metadata import EnergonDatasetType, get_dataset_type
from megatron.energon.savable_loader import SavableDataLoader

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.sample import (
    Outcome,
    RawSample,
    RejectedSample,
    SkippedSample,
    try_encode,
)
from megatron_mimo.data.tokenizer import Tokenizer

_IMAGE_PARTS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "ppm")


def train_stream(
    config: DataConfig, lane: int, num_lanes: int, tokenizer: Tokenizer, *, with_patches: bool
) -> "EnergonStream":
    """Endless, shuffled outcomes of a lane's share of the train split.

    Args:
        config: Dataset, seed, shuffling and reader processes.
        lane: Whose samples.
        num_lanes: Among how many lanes the split is shared.
        tokenizer: Of the texts.
        with_patches: Keep the pixels.

    Raises:
        ValueError: The dataset is missing, not prepared, or has no train split.
    """
    worker_config = _worker_config(config, lane, num_lanes, config.num_workers)
    path = _checked_path(config)
    try:
        dataset: Any = get_train_dataset(
            path,
            worker_config=worker_config,
            batch_size=None,
            shuffle_buffer_size=config.shuffle_buffer_size or None,
            max_samples_per_sequence=config.max_samples_per_sequence,
            task_encoder=_Encoder(config, tokenizer, with_patches=with_patches),
        )
    except _BUILD_ERRORS as error:
        raise _unreadable(path, "train", error) from error
    return EnergonStream(dataset, config)


def eval_stream(
    config: DataConfig, lane: int, num_lanes: int, tokenizer: Tokenizer, *, with_patches: bool
) -> "EnergonStream":
    """Outcomes of a lane's share of the val split, in stored order, from its start; endless.

    Read in this process whatever `num_workers` says: evaluations are short, and their samples then
    do not depend on the number of workers.

    Args:
        config: Dataset.
        lane: Whose samples.
        num_lanes: Among how many lanes the split is shared.
        tokenizer: Of the texts.
        with_patches: Keep the pixels.

    Raises:
        ValueError: The dataset is missing, not prepared, or has no val split.
    """
    path = _checked_path(config)
    try:
        dataset: Any = get_val_dataset(
            path,
            worker_config=_worker_config(config, lane, num_lanes, num_workers=0),
            # Single samples, although energon's own hint asks for a size.
            batch_size=None,
            task_encoder=_Encoder(config, tokenizer, with_patches=with_patches),
        )
    except _BUILD_ERRORS as error:
        raise _unreadable(path, "val", error) from error
    return EnergonStream(dataset, config)


def _worker_config(config: DataConfig, lane: int, num_lanes: int, num_workers: int) -> WorkerConfig:
    return WorkerConfig(
        rank=lane,
        world_size=num_lanes,
        num_workers=num_workers,
        seed_offset=config.seed,
        # Errors of a sample travel as outcomes; any other would leave samples out unseen.
        global_error_handler=reraise_exception,
    )


class EnergonStream(Iterator[Outcome]):
    """Outcomes of one lane's readers, again and again; they start with the first outcome.

    Args:
        dataset: Of one lane.
        config: Batch sizes; names the dataset in errors.
    """

    def __init__(self, dataset: Any, config: DataConfig) -> None:
        in_process = dataset.worker_config.num_workers == 0
        self._num_workers = dataset.worker_config.num_workers
        self._loader: Any = SavableDataLoader(
            dataset,
            prefetch_factor=max(2, 2 * config.micro_batch_size),
            # energon collects garbage every few samples, and freezes what lives: right for a
            # reader process, but not for the training process.
            gc_collect_every_n_steps=0 if in_process else 100,
            watchdog_timeout_seconds=None if in_process else 60,
        )
        # Outcomes hold no tensors, so there is nothing to pin.
        self._loader.pin_memory = False
        self._where = f"--data-path {config.path}"
        self._outcomes: Iterator[Outcome] | None = None

    def __next__(self) -> Outcome:
        if self._outcomes is None:
            if self._num_workers:
                # Readers are forked, and collect garbage: what this process has left, process
                # groups of gloo for one, must be gone by then, as it cannot be ended elsewhere.
                gc.collect()
            self._outcomes = _passes(self._loader, self._where)
        return next(self._outcomes)

    def state(self) -> Mapping[str, Any]:
        """Energon's own state of the readers."""
        return {"energon": self._loader.save_state_rank(), "num_workers": self._num_workers}

    def restore(self, lane: int, lanes: Sequence[Any]) -> None:
        """Go on; energon binds what was read to its lanes and reader processes.

        Raises:
            ValueError: Their number has changed, or the checkpoint is of another kind of data.
        """
        before = lanes[lane] if lane < len(lanes) else lanes[0]
        if "energon" not in before:
            raise ValueError(
                f"{self._where}: the checkpoint's data was not read with energon; "
                f"use --finetune to begin with this dataset"
            )
        world_size = self._loader.worker_config.world_size
        if len(lanes) != world_size or before["num_workers"] != self._num_workers:
            raise ValueError(
                f"{self._where} cannot go on with --llm-dp {world_size} --num-workers "
                f"{self._num_workers}: the checkpoint's readers had --llm-dp {len(lanes)} "
                f"--num-workers {before['num_workers']}; keep them"
            )
        self._loader.restore_state_rank(before["energon"])


def _passes(loader: Any, dataset: str) -> Iterator[Outcome]:
    """Outcomes of the loader, again and again; none if a pass is empty."""
    was_empty = False
    while not was_empty:
        was_empty = True
        try:
            for outcome in iter(loader):
                was_empty = False
                yield outcome
        except _READ_ERRORS as error:
            # From a reader process comes its traceback, whose last line says what happened.
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise ValueError(
                f"{dataset}: a shard cannot be read ({reason[0]}): check that every tar file of "
                f"the dataset is there and whole, and run `energon prepare` after changing one"
            ) from error


# -- the dataset's own errors ----------------------------------------------------------------------

# What reading a missing, empty or cut shard raises.
_READ_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError)
# What energon raises when it cannot make sense of a folder.
_BUILD_ERRORS = (AssertionError, EmptyDatasetError, OSError, ValueError, KeyError, TypeError)


def _checked_path(config: DataConfig) -> str:
    """The dataset's path, after the mistakes that users make first."""
    assert config.path is not None
    path = Path(config.path)
    if not path.exists():
        raise ValueError(
            f"--data-path {path} does not exist: expected an Energon dataset; "
            f"`megatron-mimo data digits --out {path}` writes one to try"
        )
    kind = get_dataset_type(EPath(path))
    if path.is_dir() and kind is not EnergonDatasetType.WEBDATASET:
        raise ValueError(
            f"--data-path {path} is not prepared for Energon: {path / '.nv-meta' / '.info.json'} "
            f"is missing; run `energon prepare {path}` on a folder of tar files"
        )
    if path.is_file() and kind is not EnergonDatasetType.METADATASET:
        raise ValueError(
            f"--data-path {path} is a file that Energon cannot train from here: expected a "
            f"dataset folder, or a metadataset ending in .yaml"
        )
    return str(path)


def _unreadable(path: str, split: str, error: Exception) -> ValueError:
    reason = str(error) or type(error).__name__
    return ValueError(
        f"--data-path {path}: the {split} split cannot be opened ({reason}): expected .nv-meta "
        f"with split.yaml and dataset.yaml, and shards for {split}; run `energon prepare {path}` "
        f"again"
    )


# -- samples ---------------------------------------------------------------------------------------


@edataclass
class _Stored(Sample):
    """The files of a webdataset sample, not yet looked into.

    Attributes:
        parts: Ending -> contents.
    """

    parts: dict[str, bytes]


@stateless  # type: ignore[untyped-decorator]
def _cook(sample: dict[str, Any]) -> _Stored:
    return _Stored(
        __key__=sample["__key__"],
        __restore_key__=sample["__restore_key__"],
        __subflavors__=sample.get("__subflavors__"),
        __sources__=sample.get("__sources__"),
        parts={name: part for name, part in sample.items() if not name.startswith("__")},
    )


class _Encoder(TaskEncoder):
    """Turns stored samples into outcomes. Nothing raises in here: see `sample.Outcome`."""

    # Bytes come through untouched; images are decoded by `sample.encode_sample`.
    decoder = None
    cookers = (Cooker(_cook),)

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, with_patches: bool) -> None:
        super().__init__()
        self._config = config
        self._tokenizer = tokenizer
        self._with_patches = with_patches

    @stateless  # type: ignore[untyped-decorator]
    def encode_sample(self, sample: Any) -> Outcome:
        """Parse, check and encode a sample."""
        source = _source(sample)
        if not isinstance(sample, _Stored):
            return RejectedSample(
                message=f"sample {sample.__key__!r} of {source} is a {type(sample).__name__}: "
                f"expected a crude dataset; write `__module__: megatron.energon` and "
                f"`__class__: CrudeWebdataset` into its .nv-meta/dataset.yaml"
            )
        parsed = parse_parts(sample.__key__, source, sample.parts)
        if not isinstance(parsed, RawSample):
            return parsed
        return try_encode(parsed, self._config, self._tokenizer, with_patches=self._with_patches)


def _source(sample: Any) -> str:
    sources = sample.__sources__
    if not sources:
        return "an unknown dataset"
    return f"dataset {sources[0].dataset_path}, shard {sources[0].shard_name}"


@dataclass(frozen=True, slots=True)
class _Text:
    question: str
    answer: str


def parse_parts(
    key: str, source: str, parts: dict[str, bytes]
) -> RawSample | SkippedSample | RejectedSample:
    """Make sense of a stored sample: `json` with question and answer, and any number of images.

    Args:
        key: Of the sample.
        source: Dataset and shard, for errors.
        parts: File ending -> contents. Images are ordered by their endings, numbers by value:
            "2.png" before "10.png".
    """
    where = f"sample {key!r} of {source}"
    unknown = [
        name for name in parts if name != "json" and name.split(".")[-1].lower() not in _IMAGE_PARTS
    ]
    if unknown or "json" not in parts:
        return RejectedSample(
            message=f"{where} has the files {', '.join(sorted(parts))}: expected json and images "
            f"({', '.join(_IMAGE_PARTS)})"
        )
    text = _parse_text(parts["json"])
    if isinstance(text, UnicodeDecodeError | json.JSONDecodeError):
        return SkippedSample(key=key, source=source, reason=f"its json is malformed: {text}")
    if isinstance(text, str):
        return RejectedSample(message=f"{where} {text}")
    names = sorted((name for name in parts if name != "json"), key=_natural_order)
    return RawSample(
        key=key,
        question=text.question,
        answer=text.answer,
        images=tuple(parts[name] for name in names),
        source=source,
    )


def _parse_text(data: bytes) -> _Text | str | UnicodeDecodeError | json.JSONDecodeError:
    """Question and answer; or what is wrong with the contents; or why they are no JSON."""
    try:
        content = json.loads(data.decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return error
    fields = content if isinstance(content, dict) else {}
    question, answer = fields.get("question"), fields.get("answer")
    if isinstance(question, str) and isinstance(answer, str):
        return _Text(question, answer)
    found = ", ".join(fields) if isinstance(content, dict) else type(content).__name__
    return f"has a json with {found or 'no fields'}: expected the texts question and answer"


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", name) if t]
