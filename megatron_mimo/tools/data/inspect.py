"""`megatron-mimo data inspect`: a dataset in the form in which the model reads it.

Samples are processed as in training: with the same task encoder and the same packing.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from megatron_mimo.checkpoint.config import FirstWeightsConfig
from megatron_mimo.config.flags import CommandLine, to_yaml
from megatron_mimo.config.model_file import read_architecture, read_folder
from megatron_mimo.config.resolve import resolve
from megatron_mimo.config.sections import (
    CheckpointSection,
    ModelSection,
    TrainConfig,
)
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.text.prompt import tokenizer_for
from megatron_mimo.data.text.tokenizer import Tokenizer
from megatron_mimo.modules.families import adapter_of
from megatron_mimo.settings import File, Number, Switch, Within
from megatron_mimo.settings.ranges import MOST_SAMPLES
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
from megatron_mimo.tools.even_choice import EvenChoice

_MOST_SHARDS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectCommandLine(CommandLine):
    """Show a dataset, or a metadataset of several, in the form in which the model reads it.

    PATH is the dataset's folder or the metadataset's YAML file. Give the flags of the training run,
    or its --config: they say how samples become tokens and rows, and whether they are packed. Other
    flags of training have no effect.

    Attributes:
        split: Name of the split to read.
        samples: Number of sequences to show on the page.
        limit: Largest number of samples to read of each dataset; left out: all.
        decode: Whether to decode every item, to find those that appear complete and are not; slow.
        out: HTML file for a page of samples, with their images, videos, clips and tokens.
    """

    split: Literal["train", "val"] = "train"
    samples: Annotated[int, Within(0, 100_000)] = 20
    limit: Annotated[Number, Within(1, MOST_SAMPLES)] = None
    decode: Switch = False
    out: Annotated[File, arg(metavar="FILE.html")] = None


def run_inspect(path: str, line: InspectCommandLine) -> int:
    """Read the dataset once, print a summary, and write the page.

    Args:
        path: Path to a dataset folder or metadataset.
        line: Flags of this command, and those of the training run.

    Returns:
        0, or 1 when no sample can be used.

    Raises:
        ValueError: The dataset cannot be read, or a flag is wrong.
    """
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
    """Settings with which a run with these flags would read the dataset.

    Args:
        path: Path to the dataset.
        train: Flags of the run; its grids, and what is loaded and saved, have no effect.

    Raises:
        ValueError: A flag is wrong.
    """
    folder = train.checkpoints.first_weights.load_hf
    needed = TrainConfig(
        model=_of_one_stage(train.model, folder),
        data=replace(train.data, provider="energon", path=path),
        checkpoints=CheckpointSection(first_weights=FirstWeightsConfig(load_hf=folder)),
    )
    resolved = resolve(needed, world_size=1)
    model, data = resolved.model, resolved.data
    return data, tokenizer_for(data, model.tokenizer_model)


def _of_one_stage(model: ModelSection, folder: str | None) -> ModelSection:
    """The same model without bars between pipeline stages."""
    base = read_folder(model.model_provider, folder)
    architecture = read_architecture(model.model_provider, model.model_config, model.override, base)
    changes = []
    for module in architecture.modules.values():
        adapter = adapter_of(module)
        before, after = adapter.parts(module), adapter.parts(adapter.one_stage(module))
        changes += [
            f"{part}.{field.name}={getattr(config, field.name)}"
            for part, config in after.items()
            for field in fields(config)
            if getattr(config, field.name) != getattr(before[part], field.name)
        ]
    return replace(model, override=(*model.override, *changes))


def survey(
    config: DataConfig, tokenizer: Tokenizer, line: InspectCommandLine
) -> tuple[Statistics, list[Shown]]:
    """Count all samples of a split, and choose sequences to show, spread evenly over it.

    Args:
        config: Settings with which samples are read.
        tokenizer: Tokenizer of the texts.
        line: Flags with the split, and the number of samples to read and to show.
    """
    statistics = Statistics(inputs=config.inputs)
    places: dict[int, Observation] = {}

    def observe(seen: Observation) -> None:
        statistics.add(seen)
        if seen.sample is not None and line.out is not None:
            places[seen.number] = seen

    reader = DatasetReader(
        config, line.split, tokenizer, observe, limit=line.limit, decode=line.decode
    )
    chosen = EvenChoice[tuple[Sequence, tuple[Observation, ...]]](
        line.samples if line.out is not None else 0
    )
    for sequence in reader.sequences():
        statistics.add_sequence(sequence.documents)
        from_where = tuple(places.pop(number) for number in sequence.numbers if number in places)
        chosen.offer((sequence, from_where))
    return statistics, [
        Shown(
            documents=reader.with_content(sequence),
            stored=reader.as_stored(sequence),
            places=from_where,
        )
        for sequence, from_where in chosen.taken()
    ]


# -- text ------------------------------------------------------------------------------------------


def describe(statistics: Statistics, config: DataConfig, split: str) -> Iterator[str]:
    """Lines of the report.

    Args:
        statistics: Counts over all samples.
        config: Settings with which they were read.
        split: Name of the split that was read.
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
        *(
            (f"rows of {config.inputs[kind].words.one}", distribution)
            for kind, distribution in statistics.rows_of_others.items()
        ),
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
    for kind, blanks in statistics.blanks.items():
        yield (
            f"a {kind.replace('blank', 'blank stands', 1)} in {blanks.count:,} samples; such as "
            f"{blanks.example}: {blanks.detail}"
        )
    if not good:
        yield "no sample can be used"


def summary(distribution: Distribution) -> str:
    """Mean, percentiles and largest value as text."""
    parts = [f"p{percent} {distribution.percentile(percent):,}" for percent in PERCENTILES]
    return f"mean {distribution.mean:,.1f}, {', '.join(parts)}, largest {distribution.largest:,}"


def fill_text(statistics: Statistics, config: DataConfig) -> str:
    """How full the sequences are, as text."""
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
