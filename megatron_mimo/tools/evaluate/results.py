"""From the scores of single answers to results by metric and task."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_mimo.tools.evaluate.intervals import bootstrap, wilson
from megatron_mimo.tools.evaluate.metrics import METRICS, Name


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Mean score of a metric over the samples of a task.

    Attributes:
        metric: Name of the metric.
        task: Name of the task; None for all samples.
        samples: Number of samples that were scored.
        score: Mean of their scores, 0 to 1.
        low: Lower end of its 95 % confidence interval.
        high: Upper end.
    """

    metric: Name
    task: str | None
    samples: int
    score: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """Fields as they are stored."""
        return asdict(self)


class Tally:
    """Collects scores, one sample after the other."""

    def __init__(self) -> None:
        self._scores: dict[Name, dict[str | None, list[float]]] = {}

    def add(self, task: str | None, scores: dict[Name, float]) -> None:
        """Count the scores of a sample."""
        for name, score in scores.items():
            by_task = self._scores.setdefault(name, {None: []})
            by_task[None].append(score)
            if task is not None:
                by_task.setdefault(task, []).append(score)

    def results(self) -> list[Result]:
        """Results of each metric: over all samples, then task by task in order of appearance."""
        return [
            _result(name, task, scores)
            for name in METRICS
            for task, scores in self._scores.get(name, {}).items()
        ]


def _result(name: Name, task: str | None, scores: Sequence[float]) -> Result:
    graded = METRICS[name].is_graded
    low, high = bootstrap(scores) if graded else wilson(round(sum(scores)), len(scores))
    mean = sum(scores) / len(scores)
    return Result(metric=name, task=task, samples=len(scores), score=mean, low=low, high=high)


def rows_of(results: Iterable[Result]) -> list[tuple[str, str, str, str, str]]:
    """Cells of a table: metric, task, score, interval, number of samples."""
    return [
        (
            METRICS[result.metric].title,
            "all" if result.task is None else result.task,
            f"{result.score:.1%}",
            f"{result.low:.1%} to {result.high:.1%}",
            f"{result.samples:,}",
        )
        for result in results
    ]


HEAD = ("metric", "task", "score", "95 % interval", "samples")
"""Headings of that table."""
