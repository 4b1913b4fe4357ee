"""Curves of a run, from our metrics.jsonl or from TensorBoard event files of any program.

A resumed run appends to its files. Where iterations go back, the values that the run had written
from there on were undone by loading a checkpoint: the later values count.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_mimo.watch.tags import METRICS_FILE, TAGS, VS_SAMPLES

_EVENTS = "events.out.tfevents."
Curve = Mapping[int, float]
"""Iteration -> value, iterations ascending; nan where it was not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """A quantity that a run logs in each iteration.

    Attributes:
        name: Name in a report.
        field: Field in metrics.jsonl.
        tag: Tag in event files, which is that of Megatron-LM.
    """

    name: str
    field: str
    tag: str


LOSS = Quantity(name="loss", field="lm_loss", tag="lm loss")
NORM = Quantity(name="gradient norm", field="grad_norm", tag="grad-norm")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCurves:
    """Curves that a run has logged.

    Attributes:
        name: Path under which the user gave the run.
        files: Files that were read, all of one folder.
        curves: Curves by TensorBoard tag; quantities that were not logged are missing.
        rewritten: Iterations that a resume has undone.
    """

    name: str
    files: tuple[Path, ...]
    curves: Mapping[str, Curve]
    rewritten: tuple[int, ...]

    @property
    def folder(self) -> Path:
        """Folder that the run has written to."""
        return self.files[0].parent

    @property
    def source(self) -> str:
        """Description of the files that were read."""
        if self.files[0].suffix == ".jsonl":
            return str(self.files[0])
        return f"{self.folder} ({len(self.files)} event file{'s' if len(self.files) > 1 else ''})"

    @property
    def loss(self) -> Curve:
        """Curve of the training loss."""
        return self.curves[LOSS.tag]

    @property
    def interval(self) -> int:
        """Smallest distance of two logged iterations; 0 for a single one."""
        return min((b - a for a, b in pairwise(self.loss)), default=0)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Values that were written at the same time."""

    iteration: int
    values: Mapping[str, float]


def read_run(path: str) -> RunCurves:
    """Read the curves of a run.

    Args:
        path: Path to metrics.jsonl, to an event file, or to a folder that has either, possibly in
            subfolders. metrics.jsonl is preferred, since event files have float32.

    Raises:
        ValueError: There is nothing to read, several runs to choose from, a damaged line, or no
            loss.
    """
    files = _find(Path(path))
    if files[0].suffix == ".jsonl":
        curves, rewritten = _in_order(_json_entries(files[0]))
    else:
        curves, rewritten = _in_order(entry for file in files for entry in _event_entries(file))
    run = RunCurves(name=path, files=tuple(files), curves=curves, rewritten=rewritten)
    if LOSS.tag not in curves:
        raise ValueError(
            f"{run.source} has no {LOSS.tag!r}: found {', '.join(sorted(curves)) or 'nothing'}; "
            f"is it the folder of another run, or of one that ended before its first log line?"
        )
    return run


def _find(path: Path) -> list[Path]:
    """The files to read: one metrics.jsonl, or event files of one folder in order of time."""
    if path.is_file():
        if path.suffix != ".jsonl" and not path.name.startswith(_EVENTS):
            raise ValueError(
                f"{path} is neither {METRICS_FILE} nor an event file ({_EVENTS}...): name one of "
                f"them, or their folder"
            )
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: expected a run's folder, or a file of it")
    metrics = path / METRICS_FILE
    if metrics.is_file():
        return [metrics]
    folders: dict[Path, list[Path]] = {}
    for found in sorted([*path.rglob(METRICS_FILE), *path.rglob(f"{_EVENTS}*")]):
        folders.setdefault(found.parent, []).append(found)
    if path in folders:
        return folders[path]
    if not folders:
        raise ValueError(
            f"{path} has neither {METRICS_FILE} nor event files ({_EVENTS}...): name what was "
            f"--tensorboard-dir of the run"
        )
    if len(folders) > 1:
        raise ValueError(
            f"{path} has curves in {len(folders)} folders, {', '.join(map(str, folders))}: name one"
        )
    ((_, files),) = folders.items()
    jsonl = [file for file in files if file.name == METRICS_FILE]
    return jsonl or files


def _json_entries(path: Path) -> Iterator[_Entry]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                iteration = int(entry.pop("iteration"))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if not line.endswith("\n"):
                    # A run that is still writing, or was killed while it was.
                    return
                raise ValueError(
                    f"{path}, line {number}: expected an object with an iteration, as a run "
                    f"writes it"
                ) from error
            yield _Entry(
                iteration,
                {
                    # What is not finite is null there.
                    TAGS.get(name, name): math.nan if value is None else float(value)
                    for name, value in entry.items()
                    if isinstance(value, float | int | None)
                },
            )


def _event_entries(path: Path) -> Iterator[_Entry]:
    # Half a second to import.
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.util import tensor_util

    for event in LegacyEventFileLoader(str(path)).Load():
        values: dict[str, float] = {}
        for value in event.summary.value:
            if value.tag.endswith(VS_SAMPLES):
                continue
            if value.HasField("simple_value"):
                values[value.tag] = float(value.simple_value)
            elif value.HasField("tensor"):
                array = tensor_util.make_ndarray(value.tensor)
                if array.size == 1 and array.dtype.kind in "fiu":
                    values[value.tag] = float(array.item())
        yield _Entry(event.step, values)


def _in_order(entries: Iterable[_Entry]) -> tuple[dict[str, Curve], tuple[int, ...]]:
    """Curves from entries in the order of writing, and the iterations that were undone."""
    curves: dict[str, dict[int, float]] = {}
    undone: set[int] = set()
    for entry in entries:
        for tag, value in entry.values.items():
            curve = curves.setdefault(tag, {})
            if curve and entry.iteration <= next(reversed(curve)):
                undone.update(_cut(curve, entry.iteration))
                if tag == LOSS.tag:
                    # The run went back; other curves may not come that far again.
                    for other in curves.values():
                        undone.update(_cut(other, entry.iteration + 1))
            curve[entry.iteration] = value
    return {tag: curve for tag, curve in curves.items() if curve}, tuple(sorted(undone))


def _cut(curve: dict[int, float], start: int) -> list[int]:
    """Remove the end of a curve, from an iteration on."""
    behind = [iteration for iteration in curve if iteration >= start]
    for iteration in behind:
        del curve[iteration]
    return behind
