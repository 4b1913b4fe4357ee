"""`megatron-mimo evaluate`: every question of a dataset to a trained model, and its scores."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megatron_mimo.border import printable
from megatron_mimo.checkpoint.folder import CHECKSUMS, checksum
from megatron_mimo.data.samples.media import on_one_line
from megatron_mimo.tools.evaluate.answers import REPORT, RESULTS, AnswerBook, Line
from megatron_mimo.tools.evaluate.config import EvaluateConfig
from megatron_mimo.tools.evaluate.dataset import Asked, Unusable, read_dataset
from megatron_mimo.tools.evaluate.intervals import CONFIDENCE
from megatron_mimo.tools.evaluate.metrics import METRICS, Name, scores_of
from megatron_mimo.tools.evaluate.page import Wrong, write_report
from megatron_mimo.tools.evaluate.place import DatasetPlace
from megatron_mimo.tools.evaluate.results import HEAD, Result, Tally, rows_of
from megatron_mimo.tools.even_choice import EvenChoice
from megatron_mimo.tools.generate.command import fields_of, open_model

if TYPE_CHECKING:
    from megatron_mimo.inference import LoadedModel

_CARDS = 48
_MOST_MESSAGES = 20
# A graded answer below it counts as wrong on the page.
_RIGHT = 0.5


@dataclass(slots=True)
class _Outcome:
    """What has become of the samples so far."""

    tally: Tally = field(default_factory=Tally)
    lines: list[Line] = field(default_factory=list)
    wrong: EvenChoice[Wrong] = field(default_factory=lambda: EvenChoice(_CARDS))
    num_wrong: int = 0
    num_bad: int = 0
    messages: list[str] = field(default_factory=list)

    @property
    def evaluated(self) -> int:
        """Number of samples with scores."""
        return len(self.lines) - self.num_bad


def run_evaluate(run: str, config: EvaluateConfig) -> int:
    """Ask, score, and print the results.

    Args:
        run: Folder of the run, or of a model.
        config: Values of the flags.

    Returns:
        The exit code: 0, or 1 when no sample could be evaluated.

    Raises:
        ValueError: There is no model or no dataset, they are damaged, or --out holds another
            evaluation; the message says which.
    """
    place = _place(config)
    model = open_model(run, config.model)
    digest = digest_of_weights(model.run.path)
    outcome = _Outcome()
    with _book(config, digest) as book:
        samples = read_dataset(place, model.run.data, model.run.tokenizer)
        with _Watch(config.limit) as watch:
            for number, sample in enumerate(islice(samples, config.limit)):
                _take(number, sample, model, book, config, outcome)
                watch.show(outcome)
        if book is not None:
            book.rewrite(outcome.lines)
    if not outcome.lines:
        raise ValueError(f"--data {place.path} has no samples{_of_split(place)}")
    if not outcome.evaluated:
        sys.stderr.write(
            f"error: none of {len(outcome.lines):,} samples of {place.path} could be evaluated\n"
        )
        return 1
    results = outcome.tally.results()
    _name_unused(config.metric, results, place.path)
    if not results:
        return 1
    summary = {
        "model": {
            "path": str(model.run.path),
            "iteration": model.run.iteration,
            "digest": digest,
        },
        "dataset": place.path,
        "split": None if place.is_file else place.split or "val",
        "sampling": fields_of(config.sampling),
        "samples": len(outcome.lines),
        "evaluated": outcome.evaluated,
        "bad": outcome.num_bad,
        "confidence": CONFIDENCE,
        "results": [result.to_json() for result in results],
    }
    _print(results, outcome, summary, as_json=config.json)
    if config.out is not None:
        _write(Path(config.out), results, outcome, summary, model)
    return 0


def _place(config: EvaluateConfig) -> DatasetPlace:
    if config.data is None:
        raise ValueError("--data is missing: expected the dataset of the questions")
    place = DatasetPlace(
        path=config.data,
        split=config.split,
        image_root=config.image_root,
        media_root=config.media_root,
        trust_dataset_code=config.trust_dataset_code,
        task_field=config.task_field,
    )
    place.check()
    return place


def _book(config: EvaluateConfig, digest: str) -> "AbstractContextManager[AnswerBook | None]":
    if config.out is None:
        return nullcontext()
    # The tokenizer of a run may be another one than it was trained with.
    asks = {
        "model": digest,
        "tokenizer": config.model.tokenizer_model,
        "sampling": fields_of(config.sampling),
    }
    return AnswerBook(Path(config.out), asks)


def digest_of_weights(folder: Path) -> str:
    """Digest of the files of a model, by which it is known again.

    Args:
        folder: Folder of one checkpoint, which has a list of its checksums, or of a model.
    """
    listed = folder / CHECKSUMS
    if listed.is_file():
        text = listed.read_bytes()
    else:
        files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
        sums = [(path.name, checksum(path)) for path in files]
        text = json.dumps([(name, found.size, found.crc32) for name, found in sums]).encode()
    return hashlib.sha256(text).hexdigest()


# -- one sample ------------------------------------------------------------------------------------


def _take(
    number: int,
    sample: Asked | Unusable,
    model: "LoadedModel",
    book: AnswerBook | None,
    config: EvaluateConfig,
    outcome: _Outcome,
) -> None:
    """Answer a sample, or take the answer of an earlier start, and score it."""
    name = sample.where if isinstance(sample, Asked) else sample.message
    digest = sample.digest()
    line = None if book is None else book.earlier(number, digest, name)
    is_new = line is None
    if line is None:
        line = {**_answered(sample, model, config), "digest": digest}
    if "answer" not in line or isinstance(sample, Unusable):
        _note_bad(line, outcome)
    else:
        line = {**line, "scores": scores_of(line["answer"], sample.expected, config.metric)}
        outcome.tally.add(sample.task, line["scores"])
        if line["scores"] and next(iter(line["scores"].values())) < _RIGHT:
            outcome.num_wrong += 1
            outcome.wrong.offer(Wrong(asked=sample, line=line))
    outcome.lines.append(line)
    if book is not None and is_new:
        book.write(line)


def _answered(sample: Asked | Unusable, model: "LoadedModel", config: EvaluateConfig) -> Line:
    if isinstance(sample, Unusable):
        return {"key": sample.key, "error": sample.message}
    line = {
        "key": sample.key,
        "task": sample.task,
        "question": sample.turns[-1].text,
        "references": list(sample.expected.references),
        "choices": list(sample.expected.choices),
    }
    try:
        answer = model.generate(sample.turns, items=sample.items, **fields_of(config.sampling))
    except ValueError as error:
        return {**line, "error": f"{sample.where}: {error}"}
    return {
        **line,
        "answer": answer.text,
        "stopped": answer.stopped,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.tokens),
    }


def _note_bad(line: Mapping[str, Any], outcome: _Outcome) -> None:
    """One line for a sample that cannot be evaluated; many of them are counted only."""
    outcome.num_bad += 1
    if outcome.num_bad <= _MOST_MESSAGES:
        message = on_one_line(str(line.get("error")))
        outcome.messages.append(message)
        sys.stderr.write(f"error: {message}\n")
    elif outcome.num_bad == _MOST_MESSAGES + 1:
        sys.stderr.write("error: more samples cannot be evaluated; they are counted\n")


# -- what is shown ---------------------------------------------------------------------------------


class _Watch(AbstractContextManager["_Watch"]):
    """A line on a terminal that says how far it is."""

    def __init__(self, limit: int | None) -> None:
        self._of = "" if limit is None else f" of {limit:,}"
        self._status = Console(stderr=True).status("asking") if sys.stderr.isatty() else None

    def __enter__(self) -> "_Watch":
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, outcome: _Outcome) -> None:
        """Say how many samples are done, and how many of them wrong."""
        if self._status is not None:
            self._status.update(
                f"{len(outcome.lines):,}{self._of} samples, {outcome.num_wrong:,} wrong"
            )


def _name_unused(chosen: Sequence[Name], results: Sequence[Result], data: str) -> None:
    """Say of a metric that it fits no sample: it would be missing without a word."""
    found = {result.metric for result in results}
    for name in chosen:
        if name not in found:
            sys.stderr.write(
                f"error: --metric {name} fits no sample of {data}: expected samples with "
                f"{METRICS[name].needs}\n"
            )


def _of_split(place: DatasetPlace) -> str:
    return "" if place.is_file else f" in its {place.split or 'val'} split"


def _about(outcome: _Outcome) -> Iterator[str]:
    yield f"{outcome.evaluated:,} sample{'' if outcome.evaluated == 1 else 's'} evaluated"
    if outcome.num_bad:
        yield f"{outcome.num_bad:,} could not be"


def _print(
    results: Sequence[Result], outcome: _Outcome, summary: Mapping[str, Any], *, as_json: bool
) -> None:
    if as_json:
        sys.stdout.write(f"{printable(json.dumps(summary, ensure_ascii=False))}\n")
        return
    table = Table(box=None)
    for name in HEAD:
        table.add_column(name, justify="left" if name in HEAD[:2] else "right")
    for row in rows_of(results):
        table.add_row(*map(printable, row))
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print("; ".join(_about(outcome)))


def _write(
    out: Path,
    results: Sequence[Result],
    outcome: _Outcome,
    summary: Mapping[str, Any],
    model: "LoadedModel",
) -> None:
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (out / RESULTS).write_text(f"{printable(text)}\n", encoding="utf-8")
    run = model.run
    write_report(
        out / REPORT,
        results,
        outcome.wrong.taken(),
        num_wrong=outcome.num_wrong,
        bad=outcome.messages,
        num_bad=outcome.num_bad,
        inputs=run.data.inputs,
        title=f"{run.path} on {summary['dataset']}",
        lead=f"{'; '.join(_about(outcome))}. Intervals hold the score with 95 % confidence.",
    )
