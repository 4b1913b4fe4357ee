"""Every rule of the report fires where it should, is quiet below, and suggests what a run takes."""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.config.flags import CommandLine, flat, parse
from megatron_mimo.config.resolve import resolve
from megatron_mimo.tools.curves import read_run
from megatron_mimo.tools.report.conclusions import conclude
from megatron_mimo.tools.report.measured import Measured, measured
from megatron_mimo.tools.report.rules import RULES
from megatron_mimo.tools.report.timeline import Bar, Timeline
from megatron_mimo.watch.rank_report import Part
from megatron_mimo.watch.start_record import StartRecord

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "report.md"
Value = float | None | Callable[[int], float | None]

TWO_GRIDS = "--encoder-dp 2 --llm-dp 2 --micro-batch-size 2 --global-batch-size 16"
# A step of 100 ms on either grid, of which most is work.
HEALTHY: dict[str, Value] = {
    "lm_loss": lambda i: 5 - 0.01 * i,
    "grad_norm": 0.8,
    "iteration_time_ms": 100.0,
    "loss_scale": 1.0,
    "skipped_iterations": 0,
    "nan_iterations": 0,
    "lm_loss_validation": lambda i: 5 - 0.01 * i if i % 10 == 0 else None,
    "time/checkpoints ms": 1.0,
    "balance/encoder rows max over mean": 1.3,
    "data/skipped samples": 0,
    "packing fill": 0.95,
    "experts/max over mean load": 1.5,
}


def times(module: str, **ms: float) -> dict[str, Value]:
    """The time of a module's step by part; what is left of 100 ms is compute."""
    parts = {"bridge": 10.0, "agreement": 5.0, "gradients": 10.0, "optimizer": 10.0} | ms
    parts["compute"] = 100 - sum(parts.values())
    return {f"time/{module} {part} ms": parts.get(part, 0.0) for part in Part}


@cache
def flags_of(argv: str, world_size: int) -> dict[str, Any]:
    """Every flag of a run, as it would record them; an error where it would not start."""
    line = parse(shlex.split(argv), CommandLine, prog="train")
    return flat(resolve(line.train, world_size).config)


def run_of(
    folder: Path,
    argv: str,
    world_size: int,
    values: dict[str, Value],
    *,
    iterations: int = 60,
    timeline: Timeline | None = None,
    begin: int = 0,
) -> Measured:
    """What is measured of a run with these flags, from the files that it would write."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(1, iterations + 1):
        of = {name: value(i) if callable(value) else value for name, value in values.items()}
        known = {name: value for name, value in of.items() if value is not None}
        lines.append(json.dumps({"iteration": i, "consumed_samples": 16 * i} | known))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    start = StartRecord(
        time="2026-01-02T03:04:05+00:00",
        iteration=begin,
        consumed_samples=16 * begin,
        train_iters=iterations,
        world_size=world_size,
        layout="",
        flags=flags_of(argv, world_size),
        command=shlex.split(argv),
        software={},
        machine={"device": "host, 2 cores"},
        kernels=[],
        variables={},
    )
    return measured(read_run(str(folder)), [start], timeline)


def traced(excess: Sequence[float], iterations: int = 2) -> Timeline:
    """Ranks of one stage whose compute takes 10 ms, and longer for some in each iteration."""
    return Timeline(
        source="somewhere",
        roles={rank: f"rank {rank}: llm dp {rank}" for rank in range(len(excess))},
        bars=tuple(
            Bar(
                rank=rank,
                iteration=iteration,
                name="llm forward 0",
                part=Part.COMPUTE,
                compute=("llm", False),
                start=0.0,
                duration=10 * (1 + more),
            )
            for rank, more in enumerate(excess)
            for iteration in range(1, iterations + 1)
        ),
    )


# Rule -> flags, ranks, values with which it fires, values just below, and what it says.
BASE = HEALTHY | times("encoder") | times("llm")
ENERGON = "--dataset-provider energon --data-path data/x"
PACKED = f"{ENERGON} --packing-buffer-size 100 --global-batch-size 8 --num-workers 4"
LONG = {"iterations": 300}
Case = tuple[str, int, dict[str, Any], dict[str, Any], str]
CASES: dict[str, list[Case]] = {
    "steps not finite": [
        (
            TWO_GRIDS,
            4,
            {"nan_iterations": lambda i: int(i == 7)},
            {},
            "1 update was left out because the loss or a gradient was not finite, first by "
            "iteration 7; look at the samples and the learning rate before it; try --lr 5e-05.",
        )
    ],
    "loss scale": [
        (
            f"{TWO_GRIDS} --fp16",
            4,
            {"skipped_iterations": lambda i: int(i <= 4), "loss_scale": 65536.0},
            {"skipped_iterations": lambda i: int(i <= 3), "loss_scale": 65536.0},
            "6.7 % of the updates (4) were skipped because the loss scale was too high for "
            "float16; try --initial-loss-scale 65536.",
        )
    ],
    "validation rises": [
        (
            f"{TWO_GRIDS} --train-iters 60",
            4,
            {"lm_loss_validation": lambda i: abs(i - 30) / 50 + 3 if i % 10 == 0 else None},
            {"lm_loss_validation": lambda i: abs(i - 30) / 300 + 3 if i % 10 == 0 else None},
            "lowest, 3 at iteration 30, while the training loss went on falling: the model begins "
            "to know its samples by heart; use a checkpoint of about iteration 30, or add "
            "samples; try --train-iters 30.",
        )
    ],
    "clipped nearly always": [
        (
            TWO_GRIDS,
            4,
            {"grad_norm": 4.2} | LONG,
            {"grad_norm": 2.9} | LONG,
            "the norm is about 4.2, the bound 1; lower --lr if the loss is not smooth, else raise "
            "the bound; try --clip-grad 4.",
        )
    ],
    "skipped samples": [
        (
            f"{TWO_GRIDS} {ENERGON}",
            4,
            {"data/skipped samples": lambda i: 0.17 * i},
            {"data/skipped samples": lambda i: 0.16 * i},
            "10 samples were left out, 1.1 % of those read; see why with `megatron-mimo data "
            "inspect data/x`.",
        )
    ],
    "loader too slow": [
        (
            f"{TWO_GRIDS} {ENERGON}",
            4,
            times("llm", data=16),
            times("llm", data=14),
            "The language model's ranks wait for samples 16 % of a step: the loader is too slow; "
            "measure it with `megatron-mimo data bench data/x`, as it is read in the training "
            "process; try --num-workers 2.",
        ),
        (
            f"{TWO_GRIDS} {ENERGON} --num-workers 8 --loader-processes 2",
            4,
            times("encoder", data=16),
            times("encoder", data=14),
            "try --loader-processes 4.",
        ),
    ],
    "encoder waits": [
        (
            TWO_GRIDS,
            4,
            times("encoder", bridge=60, gradients=2),
            times("encoder", bridge=50, gradients=2),
            "The encoder's ranks wait for the language model 60 % of a step: half as many would "
            "do, on 3 ranks in all; try --encoder-dp 1.",
        ),
        (
            f"{TWO_GRIDS} --llm-offset 2 --encoder-offset 0",
            4,
            times("encoder", bridge=60, gradients=2),
            times("encoder", bridge=50, gradients=2),
            "try --encoder-dp 1 --llm-offset 1.",
        ),
        (
            "--llm-dp 2 --micro-batch-size 2 --global-batch-size 16",
            3,
            times("encoder", bridge=60),
            times("encoder", bridge=50),
            "60 % of a step, which is the slower side; give the language model more ranks.",
        ),
        (
            "--encoder-dp 4 --llm-dp 2 --micro-batch-size 2 --global-batch-size 4",
            6,
            times("encoder", bridge=60, gradients=5),
            times("encoder", bridge=50, gradients=5),
            "half as many would do, on 4 ranks in all; a step, which has one microbatch, may take "
            "20 % longer; try --encoder-dp 2.",
        ),
    ],
    "language model waits": [
        (
            TWO_GRIDS,
            4,
            times("llm", bridge=31),
            times("llm", bridge=29),
            "The language model's ranks wait for rows 31 % of a step: the encoder is the slower "
            "side; give it more ranks, 6 ranks in all; try --encoder-dp 4.",
        ),
        (
            TWO_GRIDS,
            4,
            times("llm", bridge=31) | times("encoder", bridge=40),
            times("llm", bridge=29) | times("encoder", bridge=40),
            "let the source work further ahead; try --encoder-run-ahead 3.",
        ),
        (
            # Of the two stages only the first waits at the bridge.
            "--llm-pp 2 --micro-batch-size 1 --global-batch-size 8",
            3,
            times("llm", bridge=16),
            times("llm", bridge=14),
            "wait for rows 32 % of a step",
        ),
    ],
    "one microbatch": [
        (
            "--encoder-dp 2 --llm-dp 2 --micro-batch-size 4 --global-batch-size 8",
            4,
            times("llm", bridge=21) | times("encoder", bridge=55),
            times("llm", bridge=19) | times("encoder", bridge=45),
            "Encoder and language model take turns: a step has one microbatch for each lane, so "
            "that each waits at least 21 % of a step for the other; try --micro-batch-size 2.",
        )
    ],
    "pipeline bubble": [
        (
            "--llm-pp 2 --micro-batch-size 1 --global-batch-size 2",
            3,
            times("llm", pipeline=31),
            times("llm", pipeline=29),
            "The stages of the language model wait for each other 31 % of a step: with 2 "
            "microbatches for 2 stages 33 % cannot be avoided; more samples in a step even this "
            "out; they also change the training; try --global-batch-size 4.",
        ),
        (
            "--llm-pp 2 --micro-batch-size 1 --global-batch-size 16",
            3,
            times("llm", pipeline=31),
            times("llm", pipeline=29),
            "5.9 % would do for 16 microbatches: a stage is slower than the others; look at the "
            "timeline, and move layers between the stages.",
        ),
    ],
    "sums of gradients": [
        (
            TWO_GRIDS,
            4,
            times("llm", gradients=41),
            times("llm", gradients=39),
            "The replicas of the language model spend 41 % of a step on summing gradients; try "
            "--overlap-grad-reduce.",
        ),
        (
            TWO_GRIDS,
            4,
            times("encoder", gradients=41),
            times("encoder", gradients=39),
            "try --global-batch-size 32.",
        ),
    ],
    "straggling rank": [
        (
            "--llm-only --llm-dp 4",
            4,
            {"timeline": traced([0, 0.05, 0.35, 0])},
            {"timeline": traced([0, 0.05, 0.29, 0])},
            "Rank 2: llm dp 2 computes at least 35 % longer than its peers in every traced "
            "iteration",
        ),
        (
            "--llm-only --llm-dp 4",
            4,
            {"timeline": traced([0, 0.05, 0.35, 0])},
            {"timeline": traced([0, 0.05, 0.35, 0], iterations=1)},
            "Rank 2",
        ),
    ],
    "checkpoints stall": [
        (
            f"{TWO_GRIDS} --save runs/x --save-interval 5",
            4,
            {"time/checkpoints ms": 12.0},
            {"time/checkpoints ms": 11.0},
            "Training stood still for 11 % of the time, while checkpoints were written; try "
            "--async-save.",
        ),
        (
            f"{TWO_GRIDS} --save runs/x --save-interval 5 --async-save",
            4,
            {"time/checkpoints ms": 12.0},
            {"time/checkpoints ms": 11.0},
            "try --save-interval 10.",
        ),
    ],
    "source unbalanced": [
        (
            TWO_GRIDS,
            4,
            {"balance/encoder rows max over mean": 1.7},
            {"balance/encoder rows max over mean": 1.5},
            "The fullest replica of the encoder has 1.7 times its even share of rows, and the "
            "others wait for it; more samples in a step even this out; they also change the "
            "training; try --global-batch-size 32.",
        ),
        (
            f"{TWO_GRIDS} --encoder-dispatch lane",
            4,
            {"balance/encoder rows max over mean": 1.7},
            {"balance/encoder rows max over mean": 1.5},
            "The fullest replica of the encoder has 1.7 times its even share of rows, and the "
            "others wait for it; try --encoder-dispatch balanced.",
        ),
    ],
    "experts unbalanced": [
        (
            f"{TWO_GRIDS} --model-provider nemotron-moe-vlm-tiny",
            4,
            {"experts/max over mean load": 4.2},
            {"experts/max over mean load": 3.9},
            "The fullest expert of a layer has 4.2 times the mean load in the second half of the "
            "run; try --override language.moe_aux_loss_coeff=1e-3.",
        )
    ],
    "padding": [
        (
            f"--encoder-dp 2 --llm-dp 2 {PACKED}",
            4,
            {"packing fill": 0.79},
            {"packing fill": 0.81},
            "21 % of the positions of packed sequences are padding; choose among more samples, or "
            "shorten --seq-length; try --packing-buffer-size 200.",
        )
    ],
}
FLAT = [(name, *case) for name, cases in CASES.items() for case in cases]


def measure(folder: Path, argv: str, world: int, changes: dict[str, Any]) -> Measured:
    how = {name: changes[name] for name in ("iterations", "timeline", "begin") if name in changes}
    values = {name: value for name, value in changes.items() if name not in how}
    return run_of(folder, argv, world, BASE | values, **how)


def test_every_rule_is_tried() -> None:
    assert list(CASES) == [rule.name for rule in RULES]


@pytest.mark.parametrize(
    ("name", "argv", "world", "fires", "quiet", "text"),
    FLAT,
    ids=[f"{name}-{number}" for number, (name, *_) in enumerate(FLAT)],
)
def test_a_rule_fires_above_its_threshold_alone(
    name: str,
    argv: str,
    world: int,
    fires: dict[str, Any],
    quiet: dict[str, Any],
    text: str,
    tmp_path: Path,
) -> None:
    found = conclude(measure(tmp_path / "fires", argv, world, fires), RULES)
    assert [rule.name for rule, _ in found] == [name]
    ((_, conclusion),) = found
    assert text in conclusion.text
    below = conclude(measure(tmp_path / "quiet", argv, world, quiet), RULES)
    assert [rule.name for rule, _ in below] == []
    # The run with this flag would start: on other ranks where grids are resized.
    ranks = re.search(r"(\d+) ranks? in all", conclusion.text)
    flags_of(f"{argv} {conclusion.tokens}", int(ranks[1]) if ranks else world)


def test_a_short_run_is_not_judged_by_its_times(tmp_path: Path) -> None:
    slow = times("encoder", bridge=80, gradients=1) | {"iterations": 8}
    run = measure(tmp_path, TWO_GRIDS, 4, slow)
    assert not run.is_long_enough and conclude(run, RULES) == []


def test_ranks_of_several_modules_do_not_wait_in_vain(tmp_path: Path) -> None:
    shared = "--encoder-dp 2 --llm-dp 4 --llm-offset 0 --micro-batch-size 2 --global-batch-size 16"
    waits = times("encoder", bridge=60, gradients=2)
    assert conclude(measure(tmp_path, shared, 4, waits), RULES) == []


def test_a_resumed_run_is_judged_since_its_last_start(tmp_path: Path) -> None:
    waits = times("encoder", bridge=80, gradients=1)
    begun_again: dict[str, Any] = {
        # The first interval after the start warms up.
        name: lambda i, slow=slow, usual=BASE[name]: slow if i <= 31 else usual
        for name, slow in waits.items()
    }
    assert conclude(measure(tmp_path, TWO_GRIDS, 4, begun_again), RULES) != []
    assert conclude(measure(tmp_path, TWO_GRIDS, 4, begun_again | {"begin": 30}), RULES) == []


def test_the_table_of_the_page_is_that_of_the_code() -> None:
    rows = [f"| {rule.name} | {rule.condition} | {rule.tries} |" for rule in RULES]
    written = [
        line
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith(tuple(f"| {rule.name} |" for rule in RULES))
    ]
    assert written == rows
