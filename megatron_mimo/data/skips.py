"""What was left out of a dataset, and when that is too much."""

import logging
from collections import Counter
from dataclasses import dataclass, field

from megatron_mimo.data.sample import Drawn, SkippedSample, dataset_of

_logger = logging.getLogger(__name__)
# Skips beyond the first few are summed up once in a while only.
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

    Every rank that reads a lane sees the same samples of it, so the fraction is judged lane by
    lane: all of them stop at the same sample. Counts begin anew when a run goes on.

    Attributes:
        max_fraction: Bad samples of a lane's samples, 0 to 1, beyond which the run stops; judged
            from the thousandth sample on.
        num_skipped: Samples left out so far, over the lanes read here.
        num_replaced: Samples that train with a blank in place of an image.
    """

    max_fraction: float
    num_skipped: int = 0
    num_replaced: int = 0
    _lanes: dict[int, _Lane] = field(default_factory=dict)
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _examples: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, lane: int, drawn: Drawn) -> None:
        """Count what was drawn on a lane.

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
            raise ValueError(
                f"lane {lane}: {counts.bad} of {counts.seen} samples cannot be used, more than "
                f"--max-bad-sample-fraction {self.max_fraction} allows: repair the dataset, or "
                f"raise it. So far: {self.summary()}"
            )

    def skipped_of(self, lane: int) -> int:
        """Samples of a lane left out so far."""
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
                "keeps" if bad.kind == "blank for an image" else "skips",
                bad.key,
                bad.source,
                bad.reason,
                total,
            )
        elif total % _SUMMED_UP_EVERY == 0:
            _logger.warning("%d bad samples so far: %s", total, self.summary())
