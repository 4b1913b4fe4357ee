"""`megatron-mimo data bench`: how fast a dataset is read on this machine, and what limits it."""

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from tyro.conf import arg

from megatron_mimo.config.flags import CommandLine, to_yaml
from megatron_mimo.config.layout import grids
from megatron_mimo.config.model_file import read_architecture, read_folder
from megatron_mimo.config.sections import GridSection
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.role import DataRole, data_role
from megatron_mimo.data.text.tokenizer import Tokenizer
from megatron_mimo.settings import MoreThan, Number, Real, Switch, Within
from megatron_mimo.settings.ranges import MOST_SAMPLES
from megatron_mimo.tools.data.inspect import settings
from megatron_mimo.tools.data.statistics import items_by_kind
from megatron_mimo.tools.data.timing import Stage, TimedLoader
from megatron_mimo.tools.words import in_words
from megatron_mimo.topology import Layout

_REPEATS = 5
# Of the time: imports, opened files and buffers that fill are not what a long run sees.
_WARM_UP = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchCommandLine(CommandLine):
    """Measure how fast a dataset can be read, decoded, tokenised and packed on this machine.

    DATASET is the dataset's folder or the metadataset's YAML file. Give the flags of the training
    run, or its --config: grids, batch size, sequence length and packing decide how many processes
    a step needs. Its train split is read by one process, in the order of training.

    Attributes:
        seconds: Seconds to measure, the warm-up of a tenth included.
        samples: Number of samples to measure in the place of --seconds, without a warm-up.
        step_time: Seconds of a training step; with it, the number of reader processes that keep up
            is shown.
        json: Whether to write the numbers as one JSON object, and nothing else.
    """

    seconds: Annotated[float, MoreThan(0, 86_400)] = 10.0
    samples: Annotated[Number, Within(1, MOST_SAMPLES)] = None
    step_time: Annotated[Real, arg(metavar="SECONDS"), MoreThan(0, 86_400)] = None
    json: Switch = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What was read in some time.

    Attributes:
        seconds: Seconds of wall time.
        samples: Number of samples that were used.
        skipped: Number of samples that were left out.
        sequences: Number of sequences.
        tokens: Number of positions of the samples: tokens of text, and rows of items.
        items: Number of items, such as images, by kind.
        stages: Seconds of each stage.
    """

    seconds: float = 0.0
    samples: int = 0
    skipped: int = 0
    sequences: int = 0
    tokens: int = 0
    items: dict[str, int] = field(default_factory=dict)
    stages: dict[Stage, float] = field(default_factory=dict)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            seconds=self.seconds + other.seconds,
            samples=self.samples + other.samples,
            skipped=self.skipped + other.skipped,
            sequences=self.sequences + other.sequences,
            tokens=self.tokens + other.tokens,
            items=_sums(self.items, other.items),
            stages=_sums(self.stages, other.stages),
        )

    @property
    def slowest(self) -> Stage:
        """The stage that takes most of the time."""
        return max(self.stages, key=lambda stage: self.stages[stage])


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Reader processes of a rank of a module.

    Attributes:
        module: Name of the module.
        lanes: Number of lanes that the rank reads.
        seconds: Seconds of one process for a step of the rank.
        processes: Number of processes that read a step in the time of one.
    """

    module: str
    lanes: int
    seconds: float
    processes: int


def run_bench(path: str, line: BenchCommandLine) -> int:
    """Read the dataset for some time, and print how fast it went.

    Args:
        path: Path to a dataset folder or metadataset.
        line: Flags of this command, and those of the training run.

    Returns:
        Exit code 0.

    Raises:
        ValueError: The dataset cannot be read, or a flag is wrong.
    """
    if line.print_config:
        sys.stdout.write(to_yaml(line.train))
        return 0
    config, tokenizer = settings(path, line.train)
    layout, per_lane = _layout(line)
    repeats, dataset_size, read = measure(config, tokenizer, _role(layout), line)
    whole = sum(repeats, Counts())
    needs = needed(whole, layout, per_lane, line.step_time) if line.step_time is not None else []
    if line.json:
        found = to_json(repeats, needs, path=path, passes=read / dataset_size)
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    for text in describe(repeats, needs, config, line, read=read, dataset_size=dataset_size):
        sys.stdout.write(f"{text}\n")
    return 0


def _layout(line: BenchCommandLine) -> tuple[Layout, int]:
    """The grids of the run, and the sequences of a step on a lane."""
    model, training = line.train.model, line.train.training
    first = line.train.checkpoints.first_weights
    folder = read_folder(model.model_provider, first.load_hf, first.without)
    architecture = read_architecture(
        model.model_provider, model.model_config, model.override, folder
    )
    layout = grids(line.train.grids, tuple(architecture.modules), None)
    size = training.micro_batch_size
    whole = training.global_batch_size
    sizes = DataConfig(
        micro_batch_size=size,
        global_batch_size=size * layout.num_lanes if whole is None else whole,
    )
    return layout, sizes.num_microbatches(layout.num_lanes) * size


def _role(layout: Layout) -> DataRole:
    """The part of a step of a rank that runs every module of the layout, of one lane."""
    section = GridSection(llm_only=not layout.sources)
    return data_role(grids(section, tuple(layout.modules), 1), 0)


def measure(
    config: DataConfig, tokenizer: Tokenizer, role: DataRole, line: BenchCommandLine
) -> tuple[list[Counts], int, int]:
    """Read for some time, in several repeats.

    Args:
        config: Settings of the data.
        tokenizer: Tokenizer of the texts.
        role: Part of a step that is read.
        line: Flags with the time, or the number of samples.

    Returns:
        Counts of each repeat, the number of samples of the dataset, and the number of samples read
        in all, warm-up included.

    Raises:
        ValueError: A sample contradicts the settings, or a shard cannot be read.
    """
    loader = TimedLoader(config, role, tokenizer)
    if line.samples is not None:
        only = _read(loader, config, math.inf, line.samples)
        return [only], loader.dataset_size, only.samples + only.skipped
    warm = _read(loader, config, line.seconds * _WARM_UP, MOST_SAMPLES)
    share = line.seconds * (1 - _WARM_UP) / _REPEATS
    repeats = [_read(loader, config, share, MOST_SAMPLES) for _ in range(_REPEATS)]
    read = sum(each.samples + each.skipped for each in (warm, *repeats))
    return repeats, loader.dataset_size, read


def _read(loader: TimedLoader, config: DataConfig, seconds: float, samples: int) -> Counts:
    """Read at least a sequence, until one of the limits."""
    begin, before = time.perf_counter(), dict(loader.clock.seconds)
    found = Counts()
    while True:
        drawn = loader.next_sequence()
        items: dict[str, int] = {}
        for document in drawn.documents:
            by_kind = items_by_kind(document, config.inputs)
            items = _sums(items, {kind: len(each) for kind, each in by_kind.items()})
        found += Counts(
            samples=len(drawn.documents),
            skipped=len(drawn.skipped),
            sequences=1,
            tokens=sum(document.num_positions for document in drawn.documents),
            items=items,
        )
        spent = time.perf_counter() - begin
        if spent >= seconds or found.samples + found.skipped >= samples:
            stages = {stage: total - before[stage] for stage, total in loader.clock.seconds.items()}
            return replace(found, seconds=spent, stages=stages)


def needed(whole: Counts, layout: Layout, per_lane: int, step_time: float) -> list[Need]:
    """Reader processes for a rank of each module.

    A rank reads all lanes that it serves. Only ranks of a source decode its items. Batches are
    collated in the training process.

    Args:
        whole: Counts of all repeats.
        layout: The grids of the run.
        per_lane: Number of sequences of a step on a lane.
        step_time: Seconds of a step.
    """
    found = []
    for name, grid in layout.modules.items():
        lanes = max(len(data_role(layout, rank).lanes) for rank in grid.ranks)
        decodes = grid is not layout.target or any(
            layout.shares_ranks(source.name, name) for source in layout.sources
        )
        stages = [Stage.READ, Stage.TOKENISE, Stage.PACK, *([Stage.DECODE] if decodes else [])]
        each = sum(whole.stages[stage] for stage in stages) / whole.sequences
        seconds = each * per_lane * lanes
        found.append(
            Need(
                module=name,
                lanes=lanes,
                seconds=seconds,
                processes=max(1, math.ceil(seconds / step_time)),
            )
        )
    return found


# -- text ------------------------------------------------------------------------------------------


def describe(
    repeats: Sequence[Counts],
    needs: Sequence[Need],
    config: DataConfig,
    line: BenchCommandLine,
    *,
    read: int,
    dataset_size: int,
) -> Iterator[str]:
    """Lines of the report.

    Args:
        repeats: Counts of each repeat.
        needs: Reader processes of each module; empty where no time of a step was given.
        config: Settings of the data.
        line: Flags of the command.
        read: Number of samples read in all.
        dataset_size: Number of samples of the dataset.
    """
    whole = sum(repeats, Counts())
    times = f"{len(repeats)} times {whole.seconds / len(repeats):.1f} s"
    warm = "" if line.samples is not None else f", after a warm-up of {line.seconds * _WARM_UP:g} s"
    yield f"{config.path}, train split, one process: {times}{warm}"
    yield ""
    yield _rate("samples/s", [each.samples / each.seconds for each in repeats])
    yield _rate("tokens/s", [each.tokens / each.seconds for each in repeats])
    for name, kind in config.inputs.items():
        if whole.items.get(name):
            rates = [each.items.get(name, 0) / each.seconds for each in repeats]
            yield _rate(f"{kind.words.plural}/s", rates)
    yield ""
    yield f"{'stage':<10}{'ms of a sample':>16}{'share':>8}"
    total = sum(whole.stages.values())
    for stage, seconds in ((stage, spent) for stage, spent in whole.stages.items() if spent):
        yield f"{stage:<10}{seconds / whole.samples * 1000:>16.3f}{seconds / total:>8.0%}"
    yield ""
    slowest = whole.slowest
    yield (
        f"{_WORK[slowest]} limits: it takes {whole.stages[slowest] / total:.0%} of the time of a "
        f"sample"
    )
    if whole.skipped:
        lost = whole.skipped / (whole.skipped + whole.samples)
        yield f"{whole.skipped:,} samples were left out ({lost:.1%}): see `data inspect`"
    yield _page_cache(read, dataset_size)
    for need in needs:
        yield _need(need, line)


_WORK = {
    Stage.READ: "reading",
    Stage.DECODE: "decoding",
    Stage.TOKENISE: "tokenising",
    Stage.PACK: "packing",
    Stage.COLLATE: "collating",
}


def _rate(name: str, rates: Sequence[float]) -> str:
    spread = f"  ({min(rates):,.1f} to {max(rates):,.1f})" if len(rates) > 1 else ""
    return f"{name:<12}{statistics.median(rates):>12,.1f}{spread}"


def _page_cache(read: int, dataset_size: int) -> str:
    if read >= dataset_size:
        return (
            f"the {dataset_size:,} samples were read {read / dataset_size:.1f} times: after the "
            f"first pass their files came from memory, which is faster than from the disk"
        )
    return (
        f"{read:,} of {dataset_size:,} samples were read, each at most once: from the disk, unless "
        f"something else has read their files before"
    )


def _need(need: Need, line: BenchCommandLine) -> str:
    processes = f"{need.processes} reader process{'' if need.processes == 1 else 'es'}"
    workers = -(-need.processes // need.lanes)
    lanes = f"{need.lanes} lane{'' if need.lanes == 1 else 's'}"
    return (
        f"a step of {line.step_time:g} s needs {processes} on each rank of the "
        f"{in_words(need.module)}, which reads {lanes} ({need.seconds:.3g} s of one process): "
        f"--loader-processes {need.processes} with --num-workers {workers} or more"
    )


def to_json(
    repeats: Sequence[Counts], needs: Sequence[Need], *, path: str, passes: float
) -> dict[str, Any]:
    """The numbers, as plain data.

    Args:
        repeats: Counts of each repeat.
        needs: Reader processes of each module.
        path: Path to the dataset.
        passes: Number of times that the dataset was read.
    """
    whole = sum(repeats, Counts())
    return {
        "dataset": path,
        "seconds": whole.seconds,
        "samples": whole.samples,
        "skipped": whole.skipped,
        "sequences": whole.sequences,
        "tokens": whole.tokens,
        "items": whole.items,
        "passes": passes,
        "samples_per_s": [each.samples / each.seconds for each in repeats],
        "tokens_per_s": [each.tokens / each.seconds for each in repeats],
        "stage_seconds": {str(stage): seconds for stage, seconds in whole.stages.items()},
        "limit": str(whole.slowest),
        "processes": {need.module: need.processes for need in needs},
    }


def _sums[K, V: (int, float)](one: dict[K, V], other: dict[K, V]) -> dict[K, V]:
    return one | {key: one.get(key, 0) + value for key, value in other.items()}
