"""Items shared out over encoder ranks by their cost, against items that run where lanes decide.

- *simulated*: the reference blend (`benchlib/blend.py`): one pack in ten has images, of lognormal
  sizes. How far the busiest rank is above the mean, and what is sent to other ranks, against the
  least that any assignment would send whose ranks are as even.
- *planning*: CPU time of sharing out 2,000 images over 64 ranks, against 3 ms.
- *emulated*: forwards and backwards are waits, as in bench_step, and rows and their gradients cross
  for real: four encoder ranks and eight lanes. The language model's forward takes 20 ms; that of a
  mean encoder rank takes as long, or 0.7 of it, shared out over the microbatches as the blend does.
- *real*: `megatron-mimo train` on four ranks that hold both modules, whose work is about equal; one
  sample in five has images.

    python benchmarks/bench_dispatch.py [--smoke | --quick] [--json FILE]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchlib.blend import (
    Blend,
    Image,
    balanced,
    by_lane,
    drawn,
    layout_of,
    least_moved,
    loads,
    moved,
)
from benchlib.ranks import in_turns, run_ranks, turns
from benchlib.report import Row, Size, run_benchmark

GRIDS = ((8, 16), (32, 8), (32, 12))
BALANCE, WORST, BYTES, PLAN_MS, STEP = 1.03, 1.1, 4.0, 3.0, 0.7
ITEMS, RANKS = 2000, 64
EMULATED = (4, 8)
FORWARD_S = 0.020
SHARES = (1.0, 0.7)
RUN_AHEAD = 3
ROWS_OF_ONE = 64
"""Rows of the blend for each row that crosses: two cores are to wait, not to copy."""
# Steps that are drawn; plans that are timed; draws and repetitions of emulated steps; real runs.
CASES: dict[Size, tuple[int, int, int, int, int]] = {
    "smoke": (20, 3, 0, 0, 0),
    "quick": (100, 20, 1, 3, 1),
    "full": (400, 50, 4, 5, 3),
}
ITERATIONS, WARM_UP = 10, 3
REAL = (
    *("--nproc", "4", "--encoder-dp", "4", "--llm-dp", "4", "--llm-offset", "0"),
    *("--seq-length", "512", "--micro-batch-size", "1", "--global-batch-size", "16"),
    *("--text-only-fraction", "0.8", "--train-iters", str(ITERATIONS), "--log-interval", "1"),
    *("--override", "vision.num_layers=12", "--override", "vision.hidden_size=512"),
    *("--override", "vision.num_attention_heads=8", "--override", "vision.ffn_hidden_size=2048"),
)


def measure(size: Size) -> Iterator[Row]:
    """The rows of every case."""
    steps, plans, draws, repetitions, runs = CASES[size]
    for encoder_dp, lanes in GRIDS:
        yield from simulated_rows(encoder_dp, lanes, steps)
    yield planning_row(plans)
    if draws:
        for share in SHARES:
            yield from emulated_rows(share, draws, repetitions)
    if runs:
        yield from real_rows(runs)


def simulated_rows(encoder_dp: int, lanes: int, steps: int) -> Iterator[Row]:
    """Imbalance and bytes of a layout, over many steps of the blend."""
    blend, layout = Blend(), layout_of(encoder_dp, lanes)
    found: dict[str, list[float]] = {"lane": [], "balanced": [], "microbatch": []}
    sent = least = contents = 0.0
    for seed in range(steps):
        images = drawn(blend, lanes, seed)
        if not images:
            continue
        assigned = balanced(images, layout, 1)
        for name, ranks in (("lane", by_lane(images, layout)), ("balanced", assigned)):
            busy = loads(images, ranks, encoder_dp)
            found[name].append(max(busy) * encoder_dp / sum(busy))
        for part, ranks in by_microbatch(images, assigned):
            busy = loads(part, ranks, encoder_dp)
            fair = max(sum(busy) / encoder_dp, max(image.cost for image in part))
            found["microbatch"].append(max(busy) / fair)
            least += least_moved(part, layout)
        sent += moved(images, assigned, layout)
        contents += sum(image.nbytes for image in images)
    line = f"{encoder_dp} ranks, {lanes} lanes"
    for column, ratio, target in (
        ("by lane, of a step", statistics.mean(found["lane"]), None),
        ("balanced, of a step", statistics.mean(found["balanced"]), None),
        ("balanced, of a microbatch", statistics.mean(found["microbatch"]), BALANCE),
        ("balanced, the worst microbatch", max(found["microbatch"]), WORST),
    ):
        yield Row(
            table="Simulated imbalance",
            line=line,
            column=column,
            ours=(ratio,),
            peer=(1.0,),
            target=target,
            unit="busiest rank",
        )
    for column, whole, target in (
        ("by the least possible", least, BYTES),
        ("by all contents", contents, None),
    ):
        yield Row(
            table="Bytes sent to other ranks",
            line=line,
            column=column,
            ours=(sent / steps / 2**20,),
            peer=(whole / steps / 2**20,),
            target=target,
            unit="MiB a step",
        )


def by_microbatch(
    images: Sequence[Image], assigned: Sequence[int]
) -> Iterator[tuple[list[Image], list[int]]]:
    """The images of each microbatch that has any, and their ranks."""
    for number in sorted({image.microbatch for image in images}):
        here = [i for i, image in enumerate(images) if image.microbatch == number]
        yield [images[i] for i in here], [assigned[i] for i in here]


def planning_row(plans: int) -> Row:
    """CPU time of a plan."""
    import numpy as np

    from megatron_mimo.topology import assign_balanced

    blend = Blend(with_images=1.0, microbatches=1)
    images = [image for seed in range(3) for image in drawn(blend, RANKS, seed)][:ITEMS]
    random = np.random.default_rng(1)
    # Lanes with many of the images, with few, and without any.
    weights = random.dirichlet(np.full(RANKS, 0.3))
    homes = [(int(rank),) for rank in random.choice(RANKS, ITEMS, p=weights)]
    costs = [image.cost for image in images]
    sizes = [image.nbytes for image in images]
    spent = []
    for _ in range(plans):
        start = time.process_time()
        assign_balanced(costs, sizes, homes, range(RANKS))
        spent.append(1e3 * (time.process_time() - start))
    return Row(
        table="Planning",
        line=f"{ITEMS:,} items, {RANKS} ranks",
        column="CPU time by the limit",
        ours=tuple(spent),
        peer=(PLAN_MS,) * plans,
        target=1.0,
        unit="ms",
    )


def emulated_rows(share: float, draws: int, repetitions: int) -> Iterator[Row]:
    """Steps whose compute is a wait."""
    encoder_dp, lanes = EMULATED
    given = {"share": share, "draws": draws, "repetitions": repetitions}
    found = run_ranks(emulated, encoder_dp + lanes, given)
    balanced_s, lane_s = tuple(found["ours"]), tuple(found["peer"])
    line = f"encoder {share:g} of the language model"
    for column, ours, peer, target in (
        ("balanced by lane", balanced_s, lane_s, STEP if share == SHARES[0] else None),
        ("balanced by its critical path", balanced_s, (found["critical"],) * len(lane_s), None),
        ("critical paths", (found["critical"],), (found["critical by lane"],), None),
        ("language model alone by lane", (found["bound"],) * len(lane_s), lane_s, None),
    ):
        yield Row(
            table="Emulated compute",
            line=line,
            column=column,
            ours=ours,
            peer=peer,
            target=target,
            unit="s",
        )


def emulated(given: dict[str, Any]) -> dict[str, Any]:
    """Steps of waits, balanced ("ours") and by lane ("peer"), in turns."""
    from benchlib.emulated import BACKWARD, emulated_over

    from megatron_mimo import topology as grids
    from megatron_mimo.bridge.manifest import ManifestEntry
    from megatron_mimo.topology.groups import build_topology

    layout, blend = layout_of(*EMULATED), Blend()
    # Every encoder rank may send to every lane.
    topology = build_topology(grids.balanced(layout))
    encoder_dp, lanes = EMULATED
    # Seconds of an operation: on average over many steps, a rank's forwards take this share.
    many = [sum(image.cost for image in drawn(blend, lanes, seed)) for seed in range(100, 200)]
    mean = statistics.mean(many) / encoder_dp
    scale = given["share"] * FORWARD_S * blend.microbatches / mean

    def waits_of(images: Sequence[Image], assigned: Sequence[int]) -> dict[int, list[float]]:
        waits = {rank: [FORWARD_S] * blend.microbatches for rank in range(layout.world_size)}
        waits |= {dp: [0.0] * blend.microbatches for dp in range(encoder_dp)}
        for image, dp in zip(images, assigned, strict=True):
            waits[dp][image.microbatch] += scale * image.cost
        return waits

    def manifests_of(images: Sequence[Image], assigned: Sequence[int]) -> list[Any]:
        found: list[list[Any]] = [[] for _ in range(blend.microbatches)]
        starts: dict[tuple[int, int], int] = {}
        for image, dp in zip(images, assigned, strict=True):
            start, rows = starts.get(image[:2], 0), max(1, image.rows // ROWS_OF_ONE)
            starts[image[:2]] = start + rows
            found[image.microbatch].append(
                ManifestEntry(
                    module="encoder",
                    source_rank=dp,
                    lane=image.lane,
                    rows=rows,
                    sequence=0,
                    start=start,
                )
            )
        return found

    found: dict[str, Any] = {"ours": [], "peer": [], "critical": 0.0, "critical by lane": 0.0}
    for seed in range(given["draws"]):
        images = drawn(blend, lanes, seed)
        sides = {"ours": balanced(images, layout, 1), "peer": by_lane(images, layout)}
        steps = {
            side: emulated_over(
                topology,
                waits_of(images, assigned),
                manifests_of(images, assigned),
                RUN_AHEAD,
            )
            for side, assigned in sides.items()
        }
        times = in_turns(steps["ours"][0], steps["peer"][0], given["repetitions"])
        found["critical"] += steps["ours"][1]
        found["critical by lane"] += steps["peer"][1]
        for side, seconds in times.items():
            found[side].append(seconds)
    # Seconds of all draws together, by repetition.
    for side in sides:
        found[side] = [sum(times) for times in zip(*found[side], strict=True)]
    found["bound"] = given["draws"] * blend.microbatches * (1 + BACKWARD) * FORWARD_S
    return found


def real_rows(runs: int) -> Iterator[Row]:
    """Steps of whole runs, which differ in nothing else."""
    found: dict[str, list[Mapping[str, float]]] = {"balanced": [], "lane": []}
    for repetition in range(runs):
        for side in turns(tuple(found), repetition):
            found[side].append(trained(side))
    for column, name in (
        ("wall time of a step", "iteration_time_ms"),
        ("busiest rank's patches", "balance/encoder patches max over mean"),
    ):
        ours, peer = (tuple(each[name] for each in found[side]) for side in ("balanced", "lane"))
        unit = "ms" if name == "iteration_time_ms" else "of the mean"
        yield Row(
            table="Real compute",
            line="4 ranks with both modules",
            column=column,
            ours=ours,
            peer=peer,
            unit=unit,
        )


def trained(side: str) -> Mapping[str, float]:
    """Means over the iterations of a run after its first ones, of what is always logged."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "megatron_mimo.cli", "train", *REAL]
        subprocess.run(
            [*command, "--encoder-dispatch", side, "--tensorboard-dir", folder],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines[WARM_UP:]]
    names = ("iteration_time_ms", "balance/encoder patches max over mean")
    return {name: statistics.mean(each[name] for each in logged if name in each) for name in names}


if __name__ == "__main__":
    run_benchmark(__doc__, measure, threads=1)
