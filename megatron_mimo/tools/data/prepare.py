"""`megatron-mimo data prepare`: an Energon dataset from files of many kinds.

A source is read twice: once to check every sample and to split, and once to write. One byte per
sample stays in memory.
"""

import shlex
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from megatron_mimo.border import reason_of, show_traceback
from megatron_mimo.data.inputs import ENCODER, Inputs
from megatron_mimo.data.reading.webdataset import ShardWriter, prepare
from megatron_mimo.data.samples.media import MediaFolder, check_roots
from megatron_mimo.data.samples.sample import UnusableError
from megatron_mimo.media.audio import AudioInput
from megatron_mimo.media.images import ImageInput
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.media.video.input import VideoInput
from megatron_mimo.settings import AtLeast, Folder, Part, Switch, Within, check_bounds
from megatron_mimo.settings.ranges import MOST_SAMPLES
from megatron_mimo.tools.data.building import building
from megatron_mimo.tools.data.shards import ShardSurvey, survey_shards
from megatron_mimo.tools.data.sources import (
    Found,
    Kind,
    Problem,
    Split,
    kind_of,
    problem_of,
    read_array,
    read_folder,
    read_lines,
)
from megatron_mimo.tools.data.tables import TableFlags, TableSource

_SPLITS: tuple[Split, ...] = ("train", "val")
_BAD, _TRAIN, _VAL = 0, 1, 2
_SHOWN = 20
_FAILED = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Make an Energon dataset, without interactive prompts.

    SOURCE is a folder of images with a caption beside each (cat.jpg with cat.txt or cat.json), a
    JSONL file of samples with paths of images, a JSON file that holds an array of them, a local
    dataset of Hugging Face's (a folder of parquet files, what save_to_disk wrote, or one file), or
    a folder of tar shards in webdataset form, which are indexed as they are. Videos and audio clips
    are taken wherever images are, except from datasets of Hugging Face's.

    Attributes:
        out: Folder to create; must not exist. For tar shards it may be SOURCE, and is if left out;
            another folder gets links to them.
        image_root: Folder that paths of images, videos and clips are relative to; left out: that of
            the JSONL or JSON file, or of the dataset's files.
        media_root: Folder outside of SOURCE, or of --image-root, whose files samples may name, or
            links may lead to; give it once for each.
        val_fraction: Fraction of the samples that becomes the val split, 0 to 1; 0 for none.
        shard_size: Largest number of samples of a shard.
        shard_bytes: Largest number of bytes of a shard's files; a larger sample has a separate
            shard.
        image_token: Placeholder of an image in texts.
        skip_bad: Whether to leave bad samples out, instead of refusing all samples.
        workers: Number of threads that read samples, and of processes that index shards.
        table: What is read of a dataset of parquet or arrow files.
    """

    out: Folder = None
    image_root: Folder = None
    media_root: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="DIR")] = ()
    val_fraction: Annotated[float, AtLeast(0, below=1)] = 0.05
    shard_size: Annotated[int, Within(1, MOST_SAMPLES)] = 1000
    shard_bytes: Annotated[int, Within(1, 10**15)] = 500_000_000
    image_token: str = "<image>"
    skip_bad: Switch = False
    workers: Annotated[int, Within(1, 4096)] = 1
    table: Part[TableFlags] = field(default_factory=TableFlags)

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.image_token:
            raise ValueError("--image-token is empty: expected a placeholder such as <image>")

    @property
    def inputs(self) -> Inputs:
        """Kinds of items that samples may have."""
        # Whatever a run makes of them later: one frame tells whether a video can be used.
        videos = VideoInput(config=VideoConfig(num_frames=1), tags=("", ""), feeds=ENCODER)
        return {
            ENCODER: ImageInput(placeholder=self.image_token),
            "video": videos,
            "audio": AudioInput(tags=("", "")),
        }


@dataclass(kw_only=True, slots=True)
class Survey:
    """Result of the first reading of a source.

    Attributes:
        verdicts: Verdict on each sample, in order: bad, train or val.
        num_bad: Number of bad samples.
        num_missing: Number of those that name a file which is not there.
        problems: Problems of the first bad samples.
        kinds: Kinds of items that good samples have.
    """

    verdicts: bytearray = field(default_factory=bytearray)
    num_bad: int = 0
    num_missing: int = 0
    problems: list[Problem] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)


def run_prepare(source: str, config: PrepareConfig) -> int:
    """Write the dataset, and print what was written and which command to run next.

    Args:
        source: Path to the source.
        config: Values of the flags.

    Returns:
        0, or 1 when a file could not be written.

    Raises:
        ValueError: The source is of an unknown kind or has bad samples, or the target exists.
    """
    path = Path(source)
    kind = kind_of(path)
    if kind != "shards" and config.out is None:
        raise ValueError("--out is missing: expected the folder to make")
    out = path if config.out is None else Path(config.out)
    _refuse_target(path, out, kind)
    _refuse_flags(path, kind, config)
    try:
        report, kinds = (
            (_index_shards(path, out, config), set())
            if kind == "shards"
            else _write_dataset(_opened(path, kind, config), out, config)
        )
    except OSError as error:
        show_traceback(error)
        sys.stderr.write(f"error: {out} was not written: {reason_of(error)}\n")
        return _FAILED
    sys.stdout.write(report + _next_commands(out, kinds))
    return 0


def _refuse_target(source: Path, out: Path, kind: Kind) -> None:
    if kind == "shards" and out.resolve() == source.resolve():
        if (out / ".nv-meta").exists():
            raise ValueError(
                f"{out} is prepared already: remove {out / '.nv-meta'} to index it again"
            )
        return
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out {out} exists: name another folder, or remove it")
    if source.is_dir() and source.resolve() in out.resolve().parents:
        raise ValueError(f"--out {out} is in {source}, which is read: name a folder beside it")


def _refuse_flags(source: Path, kind: Kind, config: PrepareConfig) -> None:
    if config.table.given and kind != "table":
        raise ValueError(
            f"{config.table.given[0]} is for parquet and arrow files: leave it out for {source}"
        )
    if config.image_root is not None:
        if kind not in ("lines", "array", "table"):
            raise ValueError(
                f"--image-root is for files with paths of images: leave it out for {source}"
            )
        if not Path(config.image_root).is_dir():
            raise ValueError(f"--image-root {config.image_root} is not a folder")
    check_roots(config.media_root)


def _next_commands(out: Path, kinds: Collection[str]) -> str:
    path = shlex.quote(str(out))
    # A model that takes all that the samples have.
    model, ranks = ("omni-tiny", 3) if {*kinds} - {ENCODER} else ("nemotron-moe-vlm-tiny", 2)
    flags = f"--model-provider {model} --seq-length 1024 --packing-buffer-size 100"
    return (
        f"\nlook at it:  megatron-mimo data inspect {path} {flags} --out inspect.html\n"
        f"train on it: megatron-mimo train --nproc {ranks} {flags} --dataset-provider energon "
        f"--data-path {path}\n"
    )


# -- samples ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """A source that is read sample by sample.

    Attributes:
        path: Its path.
        read: Function that reads it from the beginning.
        files_in: Folder that paths of files in it begin in; None where they are beside captions.
    """

    path: Path
    read: Callable[[], Iterator[Found | Problem]]
    files_in: Path | None


def _opened(path: Path, kind: Kind, config: PrepareConfig) -> _Source:
    if kind == "folder":
        return _Source(path, lambda: read_folder(path, config.inputs, config.media_root), None)
    folder = path if path.is_dir() else path.parent
    root = folder if config.image_root is None else Path(config.image_root)
    media = MediaFolder(root, config.media_root)
    if kind == "table":
        return _Source(path, TableSource(path, config.table, media, config.inputs).read, root)
    read = read_lines if kind == "lines" else read_array
    return _Source(path, lambda: read(path, media, config.inputs), root)


def _write_dataset(
    source: _Source, out: Path, config: PrepareConfig
) -> tuple[str, Collection[str]]:
    """Check, split and write; returns a description for the user, and the kinds of items."""
    survey = survey_samples(source.read(), config)
    total = len(survey.verdicts)
    if survey.num_bad and not (config.skip_bad and survey.num_bad < total):
        hint = _where_images_are(source, survey)
        raise _refusal(source.path, survey.problems, survey.num_bad, total, hint=hint)
    if not total:
        raise ValueError(
            f"{source.path} holds no samples: expected images with captions beside them, or lines, "
            f"items or rows with text"
        )
    with building(out) as folder:
        shards = _write_shards(source.read(), survey.verdicts, folder, config)
        prepare(folder, shards, workers=config.workers, source=source.path)
    num_shards = sum(map(len, shards.values()))
    size = sum(shard.stat().st_size for shard in out.rglob("*.tar"))
    report = (
        f"wrote {survey.verdicts.count(_TRAIN)} train and {survey.verdicts.count(_VAL)} val "
        f"samples in {num_shards} shards ({size / 1e6:.1f} MB) to {out}\n"
        + _left_out(survey.problems, survey.num_bad)
    )
    return report, survey.kinds


def survey_samples(samples: Iterable[Found | Problem], config: PrepareConfig) -> Survey:
    """Check every sample, and choose its split by a hash of its images or text, or as it says.

    The split of a sample does not depend on the other samples, except that neither split stays
    empty where there are two good samples.

    Args:
        samples: Samples of a source, in order.
        config: Flags with the fraction of the val split and the image placeholder.
    """
    survey = Survey()
    lowest = highest = (-1, -1.0)  # number and score

    def check(sample: Found | Problem) -> Found | Problem:
        if isinstance(sample, Problem):
            return sample
        return problem_of(sample, config.inputs) or sample

    for number, sample in enumerate(_in_order(check, samples, config.workers)):
        if isinstance(sample, Problem):
            survey.num_bad += 1
            survey.num_missing += sample.is_missing
            survey.verdicts.append(_BAD)
            if len(survey.problems) < _SHOWN:
                survey.problems.append(sample)
            continue
        survey.kinds.update(sample.items)
        if sample.split is not None:
            survey.verdicts.append(_VAL if sample.split == "val" else _TRAIN)
            continue
        score = split_score(sample.identity)
        survey.verdicts.append(_VAL if score < config.val_fraction else _TRAIN)
        if lowest[0] < 0 or score < lowest[1]:
            lowest = (number, score)
        if highest[0] < 0 or score > highest[1]:
            highest = (number, score)
    if lowest[0] >= 0 and config.val_fraction and len(survey.verdicts) - survey.num_bad > 1:
        if _VAL not in survey.verdicts:
            survey.verdicts[lowest[0]] = _VAL
        elif _TRAIN not in survey.verdicts:
            survey.verdicts[highest[0]] = _TRAIN
    return survey


def split_score(identity: str) -> float:
    """A number in [0, 1) that depends on the text alone; below --val-fraction means val."""
    digest = blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / (1 << 53)


def _write_shards(
    samples: Iterable[Found | Problem],
    verdicts: bytearray,
    folder: Path,
    config: PrepareConfig,
) -> dict[str, list[str]]:
    """Write the samples that are good; the shards by split."""
    writers = {split: _SplitWriter(folder, split, config) for split in _SPLITS}
    with ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.close)
        good = _good(samples, verdicts)
        inputs = config.inputs
        for split, key, parts in _in_order(
            lambda sample: _with_parts(sample, inputs), good, config.workers
        ):
            writers[split].add(key, parts)
    return {split: writer.shards for split, writer in writers.items()}


def _good(samples: Iterable[Found | Problem], verdicts: bytearray) -> Iterator[tuple[Split, Found]]:
    """The samples that are good, each with its split."""
    number = -1
    for number, sample in enumerate(samples):
        verdict = verdicts[number] if number < len(verdicts) else _BAD
        if verdict == _BAD:
            continue
        if isinstance(sample, Problem):
            raise ValueError(f"{sample.where} has changed while it was read: start again")
        yield "val" if verdict == _VAL else "train", sample
    if number + 1 != len(verdicts):
        raise ValueError(
            f"the source had {len(verdicts)} samples and now has {number + 1}: it has changed "
            f"while it was read; start again"
        )


def _with_parts(good: tuple[Split, Found], inputs: Inputs) -> tuple[Split, str, dict[str, bytes]]:
    """Split, key and files of a sample."""
    split, sample = good
    try:
        return split, sample.key, sample.parts(inputs)
    except (OSError, UnusableError) as error:
        raise ValueError(
            f"{sample.where}: {reason_of(error)} since it was checked: start again"
        ) from error


class _SplitWriter:
    """Writes the samples of a split to one shard after the other, none of which is held in memory.

    Attributes:
        shards: Paths of the shards in the folder of the dataset.
    """

    def __init__(self, folder: Path, split: Split, config: PrepareConfig) -> None:
        (folder / split).mkdir()
        self.shards: list[str] = []
        self._folder, self._split = folder, split
        self._most_samples, self._most_bytes = config.shard_size, config.shard_bytes
        self._shard: ShardWriter | None = None
        self._samples = self._bytes = 0

    def add(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Write a sample, to a new shard where the last one is full."""
        size = sum(map(len, parts.values()))
        full = self._samples == self._most_samples or self._bytes + size > self._most_bytes
        if self._shard is None or full:
            self.close()
            self.shards.append(f"{self._split}/{len(self.shards):06d}.tar")
            self._shard = ShardWriter(self._folder / self.shards[-1])
            self._samples = self._bytes = 0
        self._shard.add(key, parts)
        self._samples += 1
        self._bytes += size

    def close(self) -> None:
        """End the last shard."""
        if self._shard is not None:
            self._shard.close()


def _in_order[A, B](function: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
    """Results of a function for each item, in order, computed a few items ahead in threads."""
    ahead: deque[Future[B]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 4 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# -- shards ----------------------------------------------------------------------------------------


def _index_shards(source: Path, out: Path, config: PrepareConfig) -> str:
    """Check shards and index them; what was done, for the user."""
    # As training will read them: paths begin in the folder of the dataset.
    media = MediaFolder(out, config.media_root)
    survey = survey_shards(source, config.inputs, media, most=_SHOWN)
    if survey.num_bad and not config.skip_bad:
        raise _refusal(source, survey.problems, survey.num_bad, survey.num_samples)
    splits = _split_shards(survey, config.val_fraction)
    in_place = out.resolve() == source.resolve()
    if not in_place and not survey.in_folders:
        placed = {split: {f"{split}/{name}": name for name in splits[split]} for split in splits}
    else:
        placed = {split: {name: name for name in splits[split]} for split in splits}
    inside = {name: new for names in placed.values() for new, name in names.items()}
    with building(out, in_place=in_place) as folder:
        for new, name in ((new, name) for names in placed.values() for new, name in names.items()):
            (folder / new).parent.mkdir(parents=True, exist_ok=True)
            (folder / new).symlink_to((source / name).resolve())
        prepare(
            folder,
            {split: list(names) for split, names in placed.items()},
            exclude=[f"{inside[shard]}/{key}" for shard, key in survey.bad_samples],
            workers=config.workers,
            source=source,
        )
    counts = {split: sum(survey.shards[name] for name in names) for split, names in splits.items()}
    listed = " and ".join(
        f"{counts[split]} {split} samples in {len(splits[split])} shards" for split in splits
    )
    how = "as they are" if in_place else "by links: keep the shards where they are"
    return f"indexed {listed} ({how}) in {out}\n" + _left_out(survey.problems, survey.num_bad)


def _split_shards(survey: ShardSurvey, val_fraction: float) -> dict[str, list[str]]:
    """Shards by split: by their folders train and val, or by a hash of their names."""
    names = list(survey.shards)
    splits: dict[str, list[str]] = {split: [] for split in _SPLITS}
    if survey.in_folders:
        for name in names:
            splits[name.split("/", 1)[0]].append(name)
        return splits
    in_order = sorted(names, key=split_score)
    num_val = sum(split_score(name) < val_fraction for name in names)
    if val_fraction and len(names) > 1:
        num_val = min(max(num_val, 1), len(names) - 1)
    else:
        num_val = 0
    val = set(in_order[:num_val])
    for name in names:
        splits["val" if name in val else "train"].append(name)
    return splits


# -- common ----------------------------------------------------------------------------------------


def _where_images_are(source: _Source, survey: Survey) -> str | None:
    """A hint for files whose paths begin in another folder; None where that is not the cause.

    Files such as LLaVA's come without their images. So many missing ones are hardly bad samples.
    """
    if source.files_in is None or survey.num_missing * 2 < survey.num_bad:
        return None
    return (
        f"{survey.num_missing} of them name files that are not in {source.files_in}: pass "
        f"--image-root with the folder that their paths begin in"
    )


def _refusal(
    source: Path, problems: Sequence[Problem], number: int, total: int, *, hint: str | None = None
) -> ValueError:
    lines = [f"{source}: {number} of {total} samples are bad; nothing was written"]
    lines += [] if hint is None else [hint]
    lines += [f"  {problem.line}" for problem in problems]
    if number > len(problems):
        lines.append(f"  and {number - len(problems)} more")
    lines.append("correct them, or pass --skip-bad to leave them out")
    return ValueError("\n".join(lines))


def _left_out(problems: Sequence[Problem], number: int) -> str:
    if not number:
        return ""
    shown = "".join(f"  {problem.line}\n" for problem in problems)
    more = f"  and {number - len(problems)} more\n" if number > len(problems) else ""
    return f"left out {number} bad samples:\n{shown}{more}"
