"""Counts of the skipped samples of a dataset, and the limit on them."""

import logging
from collections import Counter
from dataclasses import dataclass, field

from megatron_mimo.data.samples.sample import TOO_LONG, Drawn, SkippedSample, dataset_of

_logger = logging.getLogger(__name__)
# Skips beyond the first few are summarised only from time to time.
_LOGGED_EACH = 10
_SUMMED_UP_EVERY = 100
# A fraction of fewer samples than these says little.
_LEAST_SAMPLES = 1000


@dataclass(slots=True)
class _Lane:
    seen: int = 0
    bad: int = 0
    skipped: int = 0


@dataclass(slots=True)
class SkipReport:
    """Counts samples that could not be used, by dataset and kind of damage, with an example each.

    Every rank that reads a lane sees the same samples of it, so the fraction is checked lane by
    lane: all of them stop at the same sample. Counts start from zero when a run continues.

    Attributes:
        max_fraction: Fraction of bad samples of a lane, 0 to 1, above which the run stops; checked
            from the thousandth sample on.
        num_skipped: Number of skipped samples so far, over the lanes that this rank reads.
        num_replaced: Number of samples that train with a blank in place of an item.
    """

    max_fraction: float
    num_skipped: int = 0
    num_replaced: int = 0
    _lanes: dict[int, _Lane] = field(default_factory=dict)
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _examples: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, lane: int, drawn: Drawn) -> None:
        """Count the samples that were drawn on a lane.

        Raises:
            ValueError: Too many of the lane's samples are bad.
        """
        flaws = [document.flaw for document in drawn.documents if document.flaw is not None]
        counts = self._lanes.setdefault(lane, _Lane())
        counts.seen += len(drawn.documents) + len(drawn.skipped)
        counts.skipped += len(drawn.skipped)
        self.num_skipped += len(drawn.skipped)
        self.num_replaced += len(flaws)
        for bad in (*drawn.skipped, *flaws):
            counts.bad += 1
            self._note(lane, bad)
        if counts.bad > self.max_fraction * counts.seen and counts.seen >= _LEAST_SAMPLES:
            ((_, kind), _), *_ = self._counts.most_common(1)
            first = "raise --seq-length" if kind == TOO_LONG else "repair the dataset"
            raise ValueError(
                f"lane {lane}: {counts.bad} of {counts.seen} samples cannot be used, more than "
                f"--max-bad-sample-fraction {self.max_fraction} allows: {first}, or allow more. "
                f"So far: {self.summary()}"
            )

    def skipped_of(self, lane: int) -> int:
        """Number of skipped samples of a lane so far."""
        return self._lanes[lane].skipped if lane in self._lanes else 0

    def summary(self) -> str:
        """Counts by dataset and kind, the most frequent first, with a key of each."""
        return "; ".join(
            f"{count} of {dataset} ({kind}, such as {self._examples[dataset, kind]!r})"
            for (dataset, kind), count in self._counts.most_common()
        )

    def _note(self, lane: int, bad: SkippedSample) -> None:
        where = (dataset_of(bad.source), bad.kind)
        self._counts[where] += 1
        self._examples.setdefault(where, bad.key)
        total = self._counts.total()
        if total <= _LOGGED_EACH:
            _logger.warning(
                "lane %d %s sample %r of %s: %s (%d bad samples so far)",
                lane,
                "keeps" if bad.is_blank else "skips",
                bad.key,
                bad.source,
                bad.reason,
                total,
            )
        elif total % _SUMMED_UP_EVERY == 0:
            _logger.warning("%d bad samples so far: %s", total, self.summary())
