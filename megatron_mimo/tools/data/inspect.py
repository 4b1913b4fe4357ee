"""`megatron-mimo data inspect`: what the model will see of a dataset.

Samples go the way that they go in training: the same task encoder, the same packing.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.tokenizer import Tokenizer, build_tokenizer
from megatron_mimo.language.config import HybridConfig
from megatron_mimo.tools.data.page import Shown, write_page
from megatron_mimo.tools.data.reading import DatasetReader, Sequence
from megatron_mimo.tools.data.statistics import (
    PERCENTILES,
    Distribution,
    Observation,
    Source,
    Statistics,
    draw_bars,
)
from megatron_mimo.training.config import (
    CheckpointSection,
    File,
    ModelSection,
    Number,
    Switch,
    TrainConfig,
)
from megatron_mimo.training.flags import CommandLine, to_yaml
from megatron_mimo.training.model_file import read_architecture, read_folder
from megatron_mimo.training.resolve import resolve

_MOST_SHARDS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectCommandLine(CommandLine):
    """Show a dataset, or a metadataset of several, as the model will see it.

    PATH is the dataset's folder or the metadataset's YAML file. Give the flags of the training run,
    or its --config: they say how samples become tokens and rows, and whether they are packed. Flags
    that have to do with other things are passed over.

    Attributes:
        split: Which part of the dataset.
        samples: Sequences to show on the page.
        limit: Read so many samples of each dataset at most; left out: all.
        decode: Decode every image, to find those that look whole and are not; slow.
        out: Write a page of samples, with their images and tokens, to this HTML file.
    """

    split: Literal["train", "val"] = "train"
    samples: int = 20
    limit: Number = None
    decode: Switch = False
    out: Annotated[File, arg(metavar="FILE.html")] = None


def run_inspect(path: str, line: InspectCommandLine) -> int:
    """Read the dataset once, print what is in it, and write the page.

    Args:
        path: Dataset folder or metadataset.
        line: What to show, and the flags of the training run.

    Returns:
        0, or 1 when no sample can be used.

    Raises:
        ValueError: The dataset cannot be read, or a flag is wrong.
    """
    if line.samples < 0:
        raise ValueError(f"--samples is {line.samples}: expected at least 0")
    if line.limit is not None and line.limit < 1:
        raise ValueError(f"--limit is {line.limit}: expected at least 1")
    if line.out is not None and not Path(line.out).absolute().parent.is_dir():
        raise ValueError(f"--out {line.out}: its folder does not exist")
    if line.print_config:
        sys.stdout.write(to_yaml(line.train))
        return 0
    config, tokenizer = settings(path, line.train)
    statistics, shown = survey(config, tokenizer, line)
    for text in describe(statistics, config, line.split):
        sys.stdout.write(f"{text}\n")
    if line.out is not None:
        write_page(
            Path(line.out),
            statistics,
            shown,
            config,
            tokenizer,
            title=f"{path}, {line.split} split",
            lead=f"{statistics.samples:,} samples; {fill_text(statistics, config)}.",
        )
        sys.stdout.write(f"\nwrote {len(shown)} sequences to {line.out}\n")
    return 0 if statistics.images.number else 1


def settings(path: str, train: TrainConfig) -> tuple[DataConfig, Tokenizer]:
    """How a run with these flags would read the dataset.

    Args:
        path: Of the dataset.
        train: Flags of the run; its grids, and what is loaded and saved, do not matter.

    Raises:
        ValueError: A flag is wrong.
    """
    needed = TrainConfig(
        model=_of_one_stage(train.model, train.checkpoints.load_hf),
        data=replace(train.data, dataset_provider="energon", data_path=path),
        checkpoints=CheckpointSection(load_hf=train.checkpoints.load_hf),
    )
    resolved = resolve(needed, world_size=1)
    model = resolved.config.model
    return resolved.data, build_tokenizer(model.tokenizer_model, model.image_token)


def _of_one_stage(model: ModelSection, folder: str | None) -> ModelSection:
    """The same model, without bars between pipeline stages."""
    base = read_folder(model.model_provider, folder)
    architecture = read_architecture(model.model_provider, model.model_config, model.override, base)
    language = architecture.language
    if not isinstance(language, HybridConfig) or "|" not in language.pattern:
        return model
    return replace(model, override=(*model.override, f"language.pattern={language.layers}"))


def survey(
    config: DataConfig, tokenizer: Tokenizer, line: InspectCommandLine
) -> tuple[Statistics, list[Shown]]:
    """Count all samples of a split, and pick the sequences to show, spread over it evenly.

    Args:
        config: How samples are read.
        tokenizer: Of the texts.
        line: Which split, and how much of it.
    """
    statistics = Statistics()
    places: dict[int, Observation] = {}

    def observe(seen: Observation) -> None:
        statistics.add(seen)
        if seen.sample is not None and line.out is not None:
            places[seen.number] = seen

    reader = DatasetReader(
        config, line.split, tokenizer, observe, limit=line.limit, decode=line.decode
    )
    chosen = _EvenChoice[tuple[Sequence, tuple[Observation, ...]]](
        line.samples if line.out is not None else 0
    )
    for sequence in reader.sequences():
        statistics.add_sequence(sequence.documents)
        from_where = tuple(places.pop(number) for number in sequence.numbers if number in places)
        chosen.offer((sequence, from_where))
    return statistics, [
        Shown(documents=reader.with_patches(sequence), places=from_where)
        for sequence, from_where in chosen.taken()
    ]


class _EvenChoice[T]:
    """Some of many, spread evenly over them, however many come.

    Args:
        number: How many to take.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._kept: list[T] = []
        self._offered = 0
        self._every = 1

    def offer(self, item: T) -> None:
        """The next one."""
        if self._number and self._offered % self._every == 0:
            self._kept.append(item)
            if len(self._kept) == 2 * self._number:
                del self._kept[1::2]
                self._every *= 2
        self._offered += 1

    def taken(self) -> list[T]:
        """Those taken, in order."""
        kept, number = self._kept, self._number
        if len(kept) <= number:
            return kept
        return [kept[i * len(kept) // number] for i in range(number)]


# -- text ------------------------------------------------------------------------------------------


def describe(statistics: Statistics, config: DataConfig, split: str) -> Iterator[str]:
    """The report, line by line.

    Args:
        statistics: Of all samples.
        config: That they were read with.
        split: Which was read.
    """
    good = statistics.images.number
    yield f"{config.path}, {split} split: {statistics.samples:,} samples"
    if not statistics.samples:
        return
    yield (
        f"{statistics.text_only:.1%} of them are text only; images of a sample: "
        + ", ".join(
            f"{n} ({count:,} samples)" for n, count in sorted(statistics.images.counts.items())[:8]
        )
    )
    yield ""
    yield from _table("dataset", statistics.sources)
    shards = {shard: source for (_, shard), source in statistics.shards.items()}
    if 1 < len(statistics.shards) <= _MOST_SHARDS and len(statistics.sources) == 1:
        yield ""
        yield from _table("shard", shards)
    for title, distribution in (
        ("positions of a sample (tokens and rows)", statistics.positions),
        ("targets of a sample (tokens to learn)", statistics.targets),
        ("rows of a sample with images", statistics.rows_of_samples),
        ("rows of an image", statistics.rows_of_images),
    ):
        if distribution.counts:
            yield ""
            yield f"{title}: {summary(distribution)}"
            yield from draw_bars(distribution)
    yield ""
    yield from _sequences(statistics, config)
    yield ""
    bad = statistics.num_bad
    share = bad / statistics.samples
    yield f"training leaves out {bad:,} of {statistics.samples:,} samples ({share:.2%})"
    for kind, found in sorted(statistics.bad.items(), key=lambda item: -item[1].count):
        yield f"  {found.count:,}  {kind}; such as {found.example}: {found.detail}"
    if statistics.blanks is not None:
        blanks = statistics.blanks
        yield (
            f"a blank stands for an image in {blanks.count:,} samples; such as {blanks.example}: "
            f"{blanks.detail}"
        )
    if not good:
        yield "no sample can be used"


def summary(distribution: Distribution) -> str:
    """Mean, percentiles and largest."""
    parts = [f"p{percent} {distribution.percentile(percent):,}" for percent in PERCENTILES]
    return f"mean {distribution.mean:,.1f}, {', '.join(parts)}, largest {distribution.largest:,}"


def fill_text(statistics: Statistics, config: DataConfig) -> str:
    """How full the sequences are."""
    sequences = statistics.filled.number
    buffer = config.packing_buffer_size
    rate = statistics.fill_rate(config.seq_length)
    how = "without packing" if buffer is None else f"packed with --packing-buffer-size {buffer}"
    return (
        f"{sequences:,} sequences of --seq-length {config.seq_length:,} {how}: fill rate "
        f"{rate:.4f}, {statistics.documents.mean:.1f} samples in each"
    )


def _sequences(statistics: Statistics, config: DataConfig) -> Iterator[str]:
    yield fill_text(statistics, config)
    if config.packing_buffer_size is None and statistics.fill_rate(config.seq_length) < 0.9:
        yield "  --packing-buffer-size 1000 would put several samples into each"


def _table(title: str, sources: dict[str, Source]) -> Iterator[str]:
    header = (title, "samples", "bad", "text only", "images", "positions", "targets")
    rows = [header]
    for name, source in sources.items():
        good = source.samples - source.bad
        rows.append(
            (
                name,
                f"{source.samples:,}",
                f"{source.bad:,}",
                f"{source.text_only / max(1, good):.1%}",
                f"{source.images:,}",
                f"{source.tokens:,}",
                f"{source.targets:,}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        yield f"{row[0]:<{widths[0]}}  {'  '.join(cells)}"
