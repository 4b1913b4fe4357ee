"""Counts and lengths of a dataset's samples, as `megatron-mimo data inspect` shows them."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_mimo.data.sample import EncodedSample

PERCENTILES = (5, 50, 95, 99)
_BARS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One stored sample, and what training makes of it.

    Attributes:
        number: In the order of reading, from 0.
        key: As stored.
        source: Dataset.
        shard: File in it.
        sample: Encoded; None for a sample that training does not take.
        kind: Of damage; empty for a sample that training takes.
        reason: What is wrong with it; empty too.
        positions: Of a sequence that it needs; of one that is too long too, 0 where unknown.
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
    """How often each whole number occurred."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, value: int) -> None:
        """Count a value."""
        self.counts[value] += 1

    @property
    def number(self) -> int:
        """How many values."""
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(value * count for value, count in self.counts.items())

    @property
    def mean(self) -> float:
        """Their mean; 0 of none."""
        return self.total / self.number if self.counts else 0.0

    @property
    def largest(self) -> int:
        """The largest; 0 of none."""
        return max(self.counts, default=0)

    def percentile(self, percent: float) -> int:
        """The least value that at least so many percent of the values do not exceed; 0 of none."""
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
    """The least of 1, 2, 5, 10, 20, ... that is not below."""
    power = 1
    while True:
        for width in (power, 2 * power, 5 * power):
            if width >= least:
                return width
        power *= 10


@dataclass(slots=True)
class Source:
    """Counts of one dataset of a blend, or of a shard.

    Attributes:
        samples: In all.
        bad: That training does not take.
        text_only: Without an image, among the others.
        images: Of the others.
        tokens: Of the others; positions of a sequence.
        targets: Tokens to learn, of the others.
    """

    samples: int = 0
    bad: int = 0
    text_only: int = 0
    images: int = 0
    tokens: int = 0
    targets: int = 0

    def add(self, seen: Observation) -> None:
        """Count a sample."""
        self.samples += 1
        if seen.sample is None:
            self.bad += 1
            return
        self.text_only += not seen.sample.images
        self.images += len(seen.sample.images)
        self.tokens += seen.positions
        self.targets += seen.sample.target_tokens


@dataclass(slots=True)
class BadSamples:
    """Samples that training does not take, of one kind of damage.

    Attributes:
        count: How many.
        example: Key, dataset and shard of the first.
        detail: What exactly is wrong with the first.
    """

    count: int
    example: str
    detail: str


@dataclass(slots=True)
class Statistics:
    """Of all samples that were read.

    Attributes:
        sources: By dataset.
        shards: By dataset and shard.
        bad: By kind of damage.
        blanks: Good samples with a blank for an image that does not decode; counted with --decode.
        positions: Of a sequence, of each sample; too long ones too.
        targets: Tokens to learn, of each good sample.
        images: Of each good sample.
        rows_of_samples: Rows of each good sample that has an image.
        rows_of_images: Rows of each image.
        filled: Positions taken, of each sequence.
        documents: Samples of each sequence.
    """

    sources: dict[str, Source] = field(default_factory=dict)
    shards: dict[tuple[str, str], Source] = field(default_factory=dict)
    bad: dict[str, BadSamples] = field(default_factory=dict)
    blanks: BadSamples | None = None
    positions: Distribution = field(default_factory=Distribution)
    targets: Distribution = field(default_factory=Distribution)
    images: Distribution = field(default_factory=Distribution)
    rows_of_samples: Distribution = field(default_factory=Distribution)
    rows_of_images: Distribution = field(default_factory=Distribution)
    filled: Distribution = field(default_factory=Distribution)
    documents: Distribution = field(default_factory=Distribution)

    def add(self, seen: Observation) -> None:
        """Count a stored sample."""
        self.sources.setdefault(seen.source, Source()).add(seen)
        self.shards.setdefault((seen.source, seen.shard), Source()).add(seen)
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
            self.blanks = self.blanks or BadSamples(0, example, sample.flaw.reason)
            self.blanks.count += 1
        self.targets.add(sample.target_tokens)
        self.images.add(len(sample.images))
        rows = [image.rows for image in sample.images]
        if rows:
            self.rows_of_samples.add(sum(rows))
        for number in rows:
            self.rows_of_images.add(number)

    def add_sequence(self, documents: Sequence[EncodedSample]) -> None:
        """Count a sequence that training would read."""
        self.filled.add(sum(document.num_positions for document in documents))
        self.documents.add(len(documents))

    @property
    def samples(self) -> int:
        """Stored samples that were read."""
        return sum(source.samples for source in self.sources.values())

    @property
    def num_bad(self) -> int:
        """Those that training does not take."""
        return sum(source.bad for source in self.sources.values())

    @property
    def text_only(self) -> float:
        """Part of the good samples that have no image."""
        return self.images.counts[0] / max(1, self.images.number)

    def fill_rate(self, seq_length: int) -> float:
        """Part of the sequences' positions that is no padding."""
        return self.filled.total / (max(1, self.filled.number) * seq_length)


def kind_of_message(message: str) -> str:
    """What is wrong without what differs from sample to sample: numbers and names."""
    return re.sub(r"\d[\d,.]*", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "…", message))


def draw_bars(distribution: Distribution, width: int = 40) -> Iterator[str]:
    """A line of text for each bar."""
    bars = distribution.bars()
    most = max((count for _, _, count in bars), default=1)
    label = max((len(f"{last:,}") for _, last, _ in bars), default=1)
    for first, last, count in bars:
        named = f"{first:>{label},}" if first == last else f"{first:>{label},} to {last:>{label},}"
        # A bar that counts anything shows.
        length = max(1, round(width * count / most)) if count else 0
        yield f"  {named}  {'█' * length:<{width}} {count:,}"
