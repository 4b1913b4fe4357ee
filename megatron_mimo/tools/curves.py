"""The curves of a run, from our metrics.jsonl or from anybody's TensorBoard event files.

Both are appended to when a run is resumed. Where iterations go back, what the run had written from
there on was undone by loading a checkpoint: the later values count.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
_EVENTS = "events.out.tfevents."


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """Something that a run logs each iteration.

    Attributes:
        name: In words.
        field: In metrics.jsonl.
        tag: In event files; Megatron-LM's.
    """

    name: str
    field: str
    tag: str


LOSS = Quantity(name="loss", field="lm_loss", tag="lm loss")
NORM = Quantity(name="gradient norm", field="grad_norm", tag="grad-norm")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCurves:
    """What a run has logged.

    Attributes:
        name: The run as its reader called it.
        source: The file or files read.
        values: Quantity -> iteration -> value, iterations ascending; nan where it was not finite.
            A quantity that was not logged is missing.
        rewritten: Iterations that were undone by a resume.
        known: Every field or tag found, for errors.
    """

    name: str
    source: str
    values: Mapping[Quantity, Mapping[int, float]]
    rewritten: tuple[int, ...]
    known: tuple[str, ...]

    @property
    def interval(self) -> int:
        """Least distance of two logged iterations; 0 for a single one."""
        steps = list(self.values[LOSS])
        return min((b - a for a, b in pairwise(steps)), default=0)


@dataclass(frozen=True, slots=True)
class _Point:
    """One value as it was written."""

    name: str
    iteration: int
    value: float


def read_run(path: str) -> RunCurves:
    """Read a run.

    Args:
        path: metrics.jsonl, an event file, or a folder that has either, possibly deeper down.
            metrics.jsonl is preferred: event files have float32.

    Raises:
        ValueError: There is nothing to read, several runs to choose from, a damaged line, or no
            loss.
    """
    files = _find(Path(path))
    if files[0].suffix == ".jsonl":
        points, by_file = list(_json_points(files[0])), True
        source = str(files[0])
    else:
        points, by_file = [point for file in files for point in _event_points(file)], False
        source = f"{files[0].parent} ({len(files)} event file{'s' if len(files) > 1 else ''})"
    values: dict[Quantity, Mapping[int, float]] = {}
    rewritten: set[int] = set()
    for quantity in (LOSS, NORM):
        wanted = quantity.field if by_file else quantity.tag
        curve, undone = _in_order(point for point in points if point.name == wanted)
        if curve:
            values[quantity] = curve
        rewritten |= undone
    run = RunCurves(
        name=path,
        source=source,
        values=values,
        rewritten=tuple(sorted(rewritten)),
        known=tuple(sorted({point.name for point in points})),
    )
    if LOSS not in values:
        raise ValueError(
            f"{source} has no {LOSS.field if by_file else LOSS.tag!r}: found "
            f"{', '.join(run.known) or 'nothing'}; is it the folder of another run, or of one "
            f"that ended before its first log line?"
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


def _json_points(path: Path) -> Iterator[_Point]:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            iteration = int(entry["iteration"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not text.endswith("\n"):
                # A run that is still writing, or was killed while it was.
                return
            raise ValueError(
                f"{path}, line {number}: expected an object with an iteration, as a run writes it"
            ) from error
        for name, value in entry.items():
            if name != "iteration" and isinstance(value, float | int | None):
                # What is not finite is null there.
                yield _Point(name, iteration, math.nan if value is None else float(value))


def _event_points(path: Path) -> Iterator[_Point]:
    # Half a second to import.
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.util import tensor_util

    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield _Point(value.tag, event.step, float(value.simple_value))
            elif value.HasField("tensor"):
                array = tensor_util.make_ndarray(value.tensor)
                if array.size == 1 and array.dtype.kind in "fiu":
                    yield _Point(value.tag, event.step, float(array.item()))


def _in_order(points: Iterable[_Point]) -> tuple[dict[int, float], set[int]]:
    """A curve from values in the order of writing, and the iterations that were undone."""
    curve: dict[int, float] = {}
    undone: set[int] = set()
    for point in points:
        if curve and point.iteration <= next(reversed(curve)):
            behind = [iteration for iteration in curve if iteration >= point.iteration]
            undone.update(behind)
            for iteration in behind:
                del curve[iteration]
        curve[point.iteration] = point.value
    return curve, undone
