"""Counts and lengths of a dataset's samples, as `megatron-mimo data inspect` shows them."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_mimo.data.inputs import ENCODER, Inputs, Item, module_of
from megatron_mimo.data.samples.sample import EncodedSample

PERCENTILES = (5, 50, 95, 99)
_BARS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One stored sample, and the result of encoding it as training does.

    Attributes:
        number: Number in the order of reading, from 0.
        key: Key as stored.
        source: Name of the dataset.
        shard: File in the dataset.
        sample: Encoded sample; None for a sample that training rejects.
        kind: Kind of damage; empty for a sample that training accepts.
        reason: Description of the problem; empty for a sample that training accepts.
        positions: Number of positions of a sequence that the sample needs, also for a sample that
            is too long; 0 where unknown.
    """

    number: int
    key: str
    source: str
    shard: str
    sample: EncodedSample | None
    kind: str
    reason: str
    positions: int


@dataclass(slots=True)
class Distribution:
    """Number of occurrences of each whole number."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, value: int) -> None:
        """Count a value."""
        self.counts[value] += 1

    @property
    def number(self) -> int:
        """Number of values."""
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        """Sum of the values."""
        return sum(value * count for value, count in self.counts.items())

    @property
    def mean(self) -> float:
        """Mean of the values; 0 for no values."""
        return self.total / self.number if self.counts else 0.0

    @property
    def largest(self) -> int:
        """Largest value; 0 for no values."""
        return max(self.counts, default=0)

    def percentile(self, percent: float) -> int:
        """Smallest value that this percentage of the values does not exceed; 0 for none."""
        needed = math.ceil(self.number * percent / 100)
        seen = 0
        for value in sorted(self.counts):
            seen += self.counts[value]
            if seen >= needed:
                return value
        return 0

    def bars(self) -> list[tuple[int, int, int]]:
        """Up to twelve ranges of equal round widths that hold all values: (first, last, count)."""
        if not self.counts:
            return []
        low, high = min(self.counts), max(self.counts)
        width = _round_width((high - low + 1) / _BARS)
        start = low // width * width
        bars = [[first, first + width - 1, 0] for first in range(start, high + 1, width)]
        for value, count in self.counts.items():
            bars[(value - start) // width][2] += count
        return [(first, last, count) for first, last, count in bars]


def _round_width(least: float) -> int:
    """Smallest of 1, 2, 5, 10, 20, ... that is not smaller than `least`."""
    power = 1
    while True:
        for width in (power, 2 * power, 5 * power):
            if width >= least:
                return width
        power *= 10


@dataclass(slots=True)
class Source:
    """Counts over one dataset of a blend, or over a shard.

    Attributes:
        samples: Number of all samples.
        bad: Number of samples that training rejects.
        text_only: Number of good samples that have no item of any module.
        images: Number of images of the good samples.
        tokens: Number of positions of a sequence that the good samples need.
        targets: Number of tokens to learn in the good samples.
    """

    samples: int = 0
    bad: int = 0
    text_only: int = 0
    images: int = 0
    tokens: int = 0
    targets: int = 0

    def add(self, seen: Observation, images: int) -> None:
        """Count a sample, which has so many images if it is good."""
        self.samples += 1
        if seen.sample is None:
            self.bad += 1
            return
        self.text_only += not any(seen.sample.items.values())
        self.images += images
        self.tokens += seen.positions
        self.targets += seen.sample.target_tokens


@dataclass(slots=True)
class BadSamples:
    """Samples that training rejects, of one kind of damage.

    Attributes:
        count: Number of samples.
        example: Key, dataset and shard of the first one.
        detail: Description of the problem with the first one.
    """

    count: int
    example: str
    detail: str


@dataclass(slots=True)
class Statistics:
    """Counts over all samples that were read.

    Attributes:
        sources: Name of a dataset -> its counts.
        shards: Dataset and shard -> counts of the shard.
        bad: Kind of damage -> samples that training rejects.
        blanks: Kind of damage -> good samples with a blank for an item that cannot be decoded;
            counted with --decode.
        positions: Number of positions of each sample, also of those that are too long.
        targets: Number of tokens to learn of each good sample.
        images: Number of images of each good sample.
        rows_of_samples: Number of rows of each good sample that has an image.
        rows_of_images: Number of rows of each image.
        rows_of_others: Kind -> number of rows of each of its items, for further kinds.
        num_text_only: Number of good samples that have no item of any module.
        filled: Number of used positions of each sequence.
        documents: Number of samples of each sequence.
        inputs: Kinds of items that the samples may have.
    """

    sources: dict[str, Source] = field(default_factory=dict)
    shards: dict[tuple[str, str], Source] = field(default_factory=dict)
    bad: dict[str, BadSamples] = field(default_factory=dict)
    blanks: dict[str, BadSamples] = field(default_factory=dict)
    positions: Distribution = field(default_factory=Distribution)
    targets: Distribution = field(default_factory=Distribution)
    images: Distribution = field(default_factory=Distribution)
    rows_of_samples: Distribution = field(default_factory=Distribution)
    rows_of_images: Distribution = field(default_factory=Distribution)
    rows_of_others: dict[str, Distribution] = field(default_factory=dict)
    num_text_only: int = 0
    filled: Distribution = field(default_factory=Distribution)
    documents: Distribution = field(default_factory=Distribution)
    inputs: Inputs = field(default_factory=dict)

    def add(self, seen: Observation) -> None:
        """Count a stored sample."""
        by_kind = {} if seen.sample is None else items_by_kind(seen.sample, self.inputs)
        images = by_kind.get(ENCODER, [])
        self.sources.setdefault(seen.source, Source()).add(seen, len(images))
        self.shards.setdefault((seen.source, seen.shard), Source()).add(seen, len(images))
        if seen.positions:
            self.positions.add(seen.positions)
        sample = seen.sample
        if sample is None:
            example = f"{seen.key!r} of {seen.source}, shard {seen.shard}"
            bad = self.bad.setdefault(seen.kind, BadSamples(0, example, seen.reason))
            bad.count += 1
            return
        if sample.flaw is not None:
            example = f"{seen.key!r} of {seen.source}, shard {seen.shard}"
            blanks = BadSamples(0, example, sample.flaw.reason)
            self.blanks.setdefault(sample.flaw.kind, blanks).count += 1
        self.targets.add(sample.target_tokens)
        self.num_text_only += not any(sample.items.values())
        self.images.add(len(images))
        if images:
            self.rows_of_samples.add(sum(image.rows for image in images))
        for kind, items in by_kind.items():
            rows_of_items = (
                self.rows_of_images
                if kind == ENCODER
                else self.rows_of_others.setdefault(kind, Distribution())
            )
            for item in items:
                rows_of_items.add(item.rows)

    def add_sequence(self, documents: Sequence[EncodedSample]) -> None:
        """Count a sequence as training would read it."""
        self.filled.add(sum(document.num_positions for document in documents))
        self.documents.add(len(documents))

    @property
    def samples(self) -> int:
        """Number of stored samples that were read."""
        return sum(source.samples for source in self.sources.values())

    @property
    def num_bad(self) -> int:
        """Number of samples that training rejects."""
        return sum(source.bad for source in self.sources.values())

    @property
    def text_only(self) -> float:
        """Fraction of the good samples that have no item of any module."""
        return self.num_text_only / max(1, self.images.number)

    def fill_rate(self, seq_length: int) -> float:
        """Fraction of the sequences' positions that are not padding."""
        return self.filled.total / (max(1, self.filled.number) * seq_length)


def items_by_kind(sample: EncodedSample, inputs: Inputs) -> dict[str, list[Item]]:
    """Kind -> its items of a sample; a module may have items of several kinds."""
    found: dict[str, list[Item]] = {}
    for module, items in sample.items.items():
        for item in items:
            found.setdefault(kind_of_item(item, module, inputs), []).append(item)
    return found


def kind_of_item(item: Item, module: str, inputs: Inputs) -> str:
    """Name of the kind of an item of a module."""
    return next(
        (
            name
            for name, kind in inputs.items()
            if module_of(name, inputs) == module and type(item) is kind.item_type
        ),
        module,
    )


def kind_of_message(message: str) -> str:
    """Message without the parts that differ between samples, such as numbers and names."""
    return re.sub(r"(?<![^\W\d])\d+(?:[,.]\d+)*", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "…", message))


def draw_bars(distribution: Distribution, width: int = 40) -> Iterator[str]:
    """Lines of text, one for each bar."""
    bars = distribution.bars()
    most = max((count for _, _, count in bars), default=1)
    label = max((len(f"{last:,}") for _, last, _ in bars), default=1)
    for first, last, count in bars:
        named = f"{first:>{label},}" if first == last else f"{first:>{label},} to {last:>{label},}"
        # A bar that counts anything shows.
        length = max(1, round(width * count / most)) if count else 0
        yield f"  {named}  {'█' * length:<{width}} {count:,}"
