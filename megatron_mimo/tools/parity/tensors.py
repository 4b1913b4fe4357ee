"""Where the activations of two runs begin to differ: `megatron-mimo parity --tensors`."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mimo.tools.parity.outcome import EXIT_FAIL, EXIT_PASS, write_json
from megatron_mimo.watch.saved_activations import (
    METADATA,
    POSITIONS,
    SavedFile,
    SavedSample,
    in_order,
)

# Rows whose differences are taken at once in float64: logits are wide.
_BLOCK = 256

# A sample's key, and which of the samples of that key it is in its step.
SampleName = tuple[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One rank's part of a sample at a point.

    Attributes:
        path: Path to the file.
        name: Name of the tensor in the file.
        first_column: First column that the tensor has.
        width: Number of columns of all parts.
        size: Number of positions of the whole sample.
    """

    path: Path
    name: str
    first_column: int
    width: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Activations that a run saved in one iteration.

    Attributes:
        folder: Folder of the files.
        points: Parts by point and sample.
    """

    folder: Path
    points: Mapping[str, Mapping[SampleName, Sequence[Shard]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleDifference:
    """Difference of a sample's values at a point.

    Attributes:
        sample: Key of the sample.
        relative: |a - b| / |a|, with norms over all values; infinite where one is not finite.
        largest: Largest |a - b|.
        position: Position of that value in the sample.
    """

    sample: str
    relative: float
    largest: float
    position: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PointDifference:
    """Difference of two runs at a point.

    Attributes:
        point: Name of the point, one of `saved_activations.POINTS`.
        cosine: Cosine similarity of all values as one vector.
        largest: Largest |a - b|.
        mean: Mean |a - b|.
        samples: Difference of each sample.
    """

    point: str
    cosine: float
    largest: float
    mean: float
    samples: tuple[SampleDifference, ...]

    @property
    def worst(self) -> SampleDifference:
        """Sample with the largest difference."""
        return max(self.samples, key=lambda sample: sample.relative)


def run_tensor_parity(a: str, b: str, *, tolerance: float, json_path: str | None) -> int:
    """Compare the activations of two runs, and print where they begin to differ.

    Args:
        a: Folder of --save-activations of the reference.
        b: Folder of --save-activations of the other run.
        tolerance: Largest relative difference of a sample that passes.
        json_path: Path to the JSON file to write; None for no file.

    Returns:
        0 when they agree, 3 when they differ.

    Raises:
        ValueError: A folder does not hold saved activations or is incomplete, or the runs have no
            step in common.
    """
    steps_a, steps_b = find_steps(a), find_steps(b)
    common = sorted(steps_a.keys() & steps_b.keys())
    if not common:
        raise ValueError(
            f"no step in common: {a} has {_steps(steps_a)}, {b} has {_steps(steps_b)}; save the "
            f"same one with --save-activations-step"
        )
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    report: dict[str, Any] = {"run_a": a, "run_b": b, "tolerance": tolerance, "steps": {}}
    parted = False
    for number in common:
        first, second = read_step(steps_a[number]), read_step(steps_b[number])
        problem = other_samples(first, second)
        found = [] if problem else list(compare_steps(first, second))
        console.print(f"step {number}: A {first.folder}, B {second.folder}", soft_wrap=True)
        if found:
            console.print(_table(found, tolerance))
        problem = problem or first_apart(found, tolerance)
        parted |= problem is not None
        largest = max((point.worst.relative for point in found), default=0.0)
        console.print(
            f"FAIL: {problem}"
            if problem
            else f"PASS: every sample within {tolerance:g} at {len(found)} points; at most "
            f"{largest:.2e}",
            soft_wrap=True,
        )
        report["steps"][number] = {
            "verdict": "FAIL" if problem else "PASS",
            "problem": problem,
            "points": [asdict(point) for point in found],
        }
    if json_path is not None:
        write_json(json_path, report)
    return EXIT_FAIL if parted else EXIT_PASS


def find_steps(folder: str) -> dict[int, Path]:
    """Folder of each iteration; `folder` may be that of one iteration.

    Raises:
        ValueError: There are no saved activations.
    """
    root = Path(folder)
    candidates = [root] if root.name.startswith("step-") else sorted(root.glob("step-*"))
    steps = {
        int(path.name.removeprefix("step-")): path
        for path in candidates
        if path.is_dir() and path.name.removeprefix("step-").isdecimal()
    }
    if not steps:
        raise ValueError(
            f"{folder} has no saved activations (step-N/): name what was --save-activations of "
            f"the run"
        )
    return steps


def read_step(folder: Path) -> Step:
    """List the contents of a step's files, without reading the tensors.

    Raises:
        ValueError: A file is damaged; the message names it.
    """
    found: dict[str, dict[str, dict[tuple[int, int, int], list[Shard]]]] = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                about = SavedFile.from_json((file.metadata() or {}).get(METADATA, "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}; save the activations again") from error
        for sample in about.samples:
            instances = found.setdefault(about.point, {}).setdefault(sample.key, {})
            instances.setdefault(_place(sample), []).append(
                Shard(
                    path=path,
                    name=sample.name,
                    first_column=about.first_column,
                    width=about.width,
                    size=sample.size,
                )
            )
    points = {
        point: {
            (key, number): shards
            for key, instances in sorted(samples.items())
            for number, (_, shards) in enumerate(sorted(instances.items()))
        }
        for point, samples in found.items()
    }
    if not points:
        raise ValueError(f"{folder} has no saved activations: was the run cut off?")
    return Step(folder=folder, points=points)


def other_samples(a: Step, b: Step) -> str | None:
    """Samples that only one of two runs has, as text; None when both have the same."""
    for point in in_order({*a.points, *b.points}):
        mine, theirs = a.points.get(point, {}), b.points.get(point, {})
        for name, here, there in (("A", mine, theirs), ("B", theirs, mine)):
            if here and not there:
                return f"{point}: only in {name}; what the other run reads never passes it"
            only = [key for key, _ in here.keys() - there.keys()]
            if only:
                return (
                    f"the runs read other samples: {len(only)} of {len(here)} samples at "
                    f"{point}, such as {min(only)!r}, are in {name} alone"
                )
    return None


def compare_steps(a: Step, b: Step) -> Iterator[PointDifference]:
    """Differences of two runs that read the same samples, in the order of the forward.

    Raises:
        ValueError: A rank's part is missing, or shapes differ.
    """
    for point in in_order(a.points):
        yield _compare_point(point, a, b)


def first_apart(points: Sequence[PointDifference], tolerance: float) -> str | None:
    """First point with a sample beyond the tolerance, as text; None for no such point."""
    for number, point in enumerate(points):
        beyond = [sample for sample in point.samples if sample.relative > tolerance]
        if not beyond:
            continue
        worst = point.worst
        before = f" ({', '.join(p.point for p in points[:number])} agree)" if number else ""
        return (
            f"the runs differ at {point.point}{before}: {len(beyond)} of {len(point.samples)} "
            f"samples differ by more than {tolerance:g}, most {worst.sample!r} by "
            f"{worst.relative:.2e}, there most at position {worst.position} ({worst.largest:.3g})"
        )
    return None


def assemble(shards: Sequence[Shard]) -> tuple[Tensor, Tensor]:
    """A whole sample at a point from its parts: positions int64 [n], values [n, width].

    Raises:
        ValueError: A part is missing or occurs twice.
    """
    parts = []
    for shard in shards:
        with safe_open(shard.path, framework="pt") as file:
            name = shard.name
            parts.append((shard, file.get_tensor(name + POSITIONS), file.get_tensor(name)))
    positions = torch.cat([at for _, at, _ in parts]).unique()
    size, width = shards[0].size, shards[0].width
    values = parts[0][2].new_empty(len(positions), width)
    filled = torch.zeros(len(positions), dtype=torch.int64)
    for shard, at, part in parts:
        rows = torch.searchsorted(positions, at)
        values[rows, shard.first_column : shard.first_column + part.size(1)] = part
        filled[rows] += part.size(1)
    if len(positions) != size or not bool((filled == width).all()):
        raise ValueError(
            f"{shards[0].name} in {shards[0].path.parent}: {int(filled.sum())} of {size * width} "
            f"values; files of a rank are missing, or of another run; save the activations again"
        )
    return positions, values


def _compare_point(point: str, a: Step, b: Step) -> PointDifference:
    samples = []
    dot = square_a = square_b = total = 0.0
    count = 0
    for sample, shards in a.points[point].items():
        positions, mine = assemble(shards)
        at, theirs = assemble(b.points[point][sample])
        if mine.shape != theirs.shape or not torch.equal(positions, at):
            raise ValueError(
                f"{point} of sample {sample[0]!r} is {list(mine.shape)} in {a.folder} and "
                f"{list(theirs.shape)} in {b.folder}, or at other positions: the runs have other "
                f"models, sequence lengths or tokenizers"
            )
        sums = _sums(mine, theirs)
        samples.append(
            SampleDifference(
                sample=sample[0],
                relative=sums.relative,
                largest=sums.largest,
                position=int(positions[sums.row]),
            )
        )
        dot, total, count = dot + sums.dot, total + sums.absolute, count + mine.numel()
        square_a, square_b = square_a + sums.square_a, square_b + sums.square_b
    both = math.sqrt(square_a * square_b)
    return PointDifference(
        point=point,
        cosine=dot / both if both else math.nan,
        largest=max((sample.largest for sample in samples), default=0.0),
        mean=total / count,
        samples=tuple(samples),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sums:
    """Sums over the values of one sample, in float64."""

    dot: float
    square_a: float
    square_b: float
    square: float
    absolute: float
    largest: float
    row: int

    @property
    def relative(self) -> float:
        if not math.isfinite(self.square):
            return math.inf
        if self.square == 0:
            return 0.0
        return math.sqrt(self.square / self.square_a) if self.square_a else math.inf


def _sums(a: Tensor, b: Tensor) -> _Sums:
    totals = torch.zeros(5, dtype=torch.float64)
    largest, row = -1.0, 0
    for start in range(0, len(a), _BLOCK):
        x, y = (tensor[start : start + _BLOCK].double() for tensor in (a, b))
        apart = (x - y).abs()
        totals += torch.stack(
            [(x * y).sum(), (x * x).sum(), (y * y).sum(), (apart * apart).sum(), apart.sum()]
        )
        # What is not a number is further away than anything.
        by_row = apart.nan_to_num(nan=math.inf, posinf=math.inf).amax(dim=1)
        if float(by_row.max()) > largest:
            largest, row = float(by_row.max()), start + int(by_row.argmax())
    dot, square_a, square_b, square, absolute = totals.tolist()
    return _Sums(
        dot=dot,
        square_a=square_a,
        square_b=square_b,
        square=square,
        absolute=absolute,
        largest=largest,
        row=row,
    )


def _table(points: Sequence[PointDifference], tolerance: float) -> Table:
    table = Table()
    for name in (
        *("point", "samples", "beyond", "cosine", "max |A - B|", "mean |A - B|"),
        *("worst sample", "|A - B| / |A|"),
    ):
        table.add_column(name, justify="left" if name in ("point", "worst sample") else "right")
    for point in points:
        beyond = sum(sample.relative > tolerance for sample in point.samples)
        table.add_row(
            point.point,
            str(len(point.samples)),
            str(beyond),
            f"{point.cosine:.9f}",
            f"{point.largest:.3e}",
            f"{point.mean:.3e}",
            point.worst.sample,
            f"{point.worst.relative:.2e}",
        )
    return table


def _place(sample: SavedSample) -> tuple[int, int, int]:
    return sample.microbatch, sample.lane, sample.index


def _steps(steps: Mapping[int, Path]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"
