"""How long a run trains, and the learning rate over its samples."""

import math
from types import SimpleNamespace

import pytest

from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.loop_config import LengthConfig
from megatron_mimo.config.resolve import Resolved, resolve
from megatron_mimo.optim.config import AdamConfig, ScheduleConfig
from tests.harness import RunRanks

PEAK, FLOOR = 0.8, 0.1
WARMUP, DECAY, TAIL = 20, 100, 36

# As one types them, in samples.
RECIPE = "--lr-decay-style WSD --lr-wsd-decay-style minus_sqrt --lr 1.2e-3 --min-lr 1.2e-5 "
PARITY = (
    RECIPE + "--global-batch-size 192 --train-samples 36621094 --lr-warmup-samples 1024000 "
    "--lr-decay-samples 35597094 --lr-wsd-decay-samples 5493164"
)
PRODUCTION = (
    RECIPE + "--global-batch-size 768 --train-samples 122070313 --lr-warmup-samples 1024000 "
    "--lr-decay-samples 121046313 --lr-wsd-decay-samples 18310547"
)
SCALING = (
    RECIPE + "--global-batch-size 384 --train-iters 50 --lr-warmup-samples 0 "
    "--lr-decay-samples 121046313 --lr-wsd-decay-samples 1"
)


def run(flags: str) -> Resolved:
    return resolve(parse(flags.split(), CommandLine, prog="train").train, 1)


def rates(adam: AdamConfig, schedule: ScheduleConfig, samples: list[int]) -> list[float]:
    """The learning rate that the optimizer has after each number of samples."""
    from megatron_mimo.optim.mimo_optimizer import build_scheduler

    optimizer = SimpleNamespace(param_groups=[{}])
    scheduler = build_scheduler(optimizer, adam, schedule)  # type: ignore[arg-type]
    found = []
    for count in samples:
        scheduler.step(count - scheduler.num_steps)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def between(height: float) -> float:
    """From the floor, 0, to the peak, 1."""
    return FLOOR + (PEAK - FLOOR) * height


def linear(done: float) -> float:
    return between(1 - done)


def cosine(done: float) -> float:
    return between((1 + math.cos(math.pi * done)) / 2)


def exponential(done: float) -> float:
    """2**-done falls to a half, where the floor is."""
    return between(2 * 2**-done - 1)


def minus_sqrt(done: float) -> float:
    return between(1 - math.sqrt(done))


TAILS = {
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "minus_sqrt": minus_sqrt,
}


def expected(style: str, tail: str | None, samples: int) -> float:
    if samples <= WARMUP:
        return PEAK * samples / WARMUP
    if style == "constant":
        return PEAK
    if samples > DECAY:
        return FLOOR
    if style == "inverse-square-root":
        return PEAK * math.sqrt(WARMUP / samples)
    if tail is None:
        return {"linear": linear, "cosine": cosine}[style]((samples - WARMUP) / (DECAY - WARMUP))
    return PEAK if samples <= DECAY - TAIL else TAILS[tail]((samples - DECAY + TAIL) / TAIL)


@pytest.mark.parametrize(
    ("style", "tail"),
    [
        ("constant", None),
        ("linear", None),
        ("cosine", None),
        ("inverse-square-root", None),
        *(("WSD", tail) for tail in TAILS),
    ],
)
@pytest.mark.parametrize("in_samples", [True, False])
def test_follows_the_formula(
    run_ranks: RunRanks, style: str, tail: str | None, in_samples: bool
) -> None:
    unit, size = ("samples", 1) if in_samples else ("iters", 4)
    flags = (
        f"--lr {PEAK} --min-lr {FLOOR} --lr-decay-style {style} --global-batch-size 4 "
        f"--lr-warmup-{unit} {WARMUP // size} --lr-decay-{unit} {DECAY // size}"
    )
    if tail is not None:
        flags += f" --lr-wsd-decay-{unit} {TAIL // size} --lr-wsd-decay-style {tail}"
    resolved = run(flags)
    samples = list(range(2 * DECAY))
    (found,) = run_ranks(1, rates, resolved.adam, resolved.schedule, samples)
    assert found == pytest.approx([expected(style, tail, n) for n in samples], rel=1e-12)


def test_formulas_at_known_points() -> None:
    half = (PEAK + FLOOR) / 2
    assert expected("linear", None, 60) == pytest.approx(half)
    assert expected("cosine", None, 60) == pytest.approx(half)
    assert expected("inverse-square-root", None, 80) == pytest.approx(PEAK / 2)
    for tail in TAILS:
        assert expected("WSD", tail, DECAY - TAIL) == PEAK
        assert expected("WSD", tail, DECAY) == pytest.approx(FLOOR)
    assert expected("WSD", "minus_sqrt", DECAY - TAIL + TAIL // 4) == pytest.approx(half)


def test_inverse_square_root_stops_at_the_floor(run_ranks: RunRanks) -> None:
    flags = "--lr 0.8 --min-lr 0.5 --lr-decay-style inverse-square-root --lr-warmup-iters 4"
    resolved = run(flags)
    (found,) = run_ranks(1, rates, resolved.adam, resolved.schedule, [8, 10, 11, 100])
    assert found == pytest.approx([0.8 / math.sqrt(2), 0.8 * math.sqrt(0.4), 0.5, 0.5])


@pytest.mark.parametrize(
    ("flags", "train_iters", "schedule"),
    [
        (PARITY, 190_734, (1_024_000, 35_597_094, 5_493_164)),
        (PRODUCTION, 158_945, (1_024_000, 121_046_313, 18_310_547)),
        (SCALING, 50, (0, 121_046_313, 1)),
    ],
)
def test_schedules_of_real_runs(
    run_ranks: RunRanks, flags: str, train_iters: int, schedule: tuple[int, int, int]
) -> None:
    resolved = run(flags)
    warmup, decay, tail = schedule
    assert resolved.train_iters == train_iters
    assert resolved.schedule == ScheduleConfig(
        style="WSD",
        warmup_samples=warmup,
        decay_samples=decay,
        wsd_decay_samples=tail,
        wsd_decay_style="minus_sqrt",
    )
    points = [warmup // 2, warmup, decay - tail, decay - tail // 2, decay, decay + 1]
    (found,) = run_ranks(1, rates, resolved.adam, resolved.schedule, points)
    done = (tail - tail // 2) / tail
    falling = 1.2e-5 + (1.2e-3 - 1.2e-5) * (1 - math.sqrt(done))
    rising = 0.6e-3 if warmup else 1.2e-3
    assert found == pytest.approx([rising, 1.2e-3, 1.2e-3, falling, 1.2e-5, 1.2e-5], rel=1e-9)


@pytest.mark.parametrize(
    ("flags", "train_iters", "warmup", "decay"),
    [
        ("", 100, 0, 600),
        ("--train-iters 7", 7, 0, 42),
        ("--train-samples 45", 7, 0, 45),
        ("--train-samples 45 --lr-warmup-iters 2", 7, 12, 45),
        ("--train-iters 7 --lr-warmup-samples 5 --lr-decay-samples 33", 7, 5, 33),
        ("--train-samples 6 --lr-decay-iters 9", 1, 0, 54),
    ],
)
def test_units_mix_and_training_gives_the_decay(
    flags: str, train_iters: int, warmup: int, decay: int
) -> None:
    resolved = run(f"--global-batch-size 6 {flags}")
    assert resolved.train_iters == train_iters
    assert resolved.schedule.warmup_samples == warmup
    assert resolved.schedule.decay_samples == decay


def test_fills_one_of_each_pair() -> None:
    left_out = run("").config.training
    assert left_out.length == LengthConfig(train_iters=100)
    assert left_out.schedule == ScheduleConfig(warmup_iters=0, decay_iters=100)
    given = run("--train-samples 45 --lr-warmup-samples 5").config.training
    assert given.length == LengthConfig(train_samples=45)
    assert given.schedule == ScheduleConfig(warmup_samples=5, decay_samples=45)
    wsd = run("--lr-decay-style WSD --lr-wsd-decay-iters 5").config.training.schedule
    assert wsd.wsd_decay_style == "exponential"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train-samples 0", r"^--train-samples is 0: expected 1 to 1,000,000,000,000$"),
        ("--train-samples 7", r"^--train-samples 7 is below --global-batch-size 8: "),
        ("--lr-warmup-samples -1", r"^--lr-warmup-samples is -1: expected 0 to 1,000,000,000,000$"),
        ("--lr-decay-samples 0", r"^--lr-decay-samples is 0: expected 1 to 1,000,000,000,000$"),
        (
            "--lr-warmup-iters 5 --lr-decay-samples 40",
            r"^--lr-warmup-iters 5 \(40 samples\) is not below --lr-decay-samples 40: ",
        ),
        (
            "--lr-warmup-samples 80 --train-iters 10",
            r"^--lr-warmup-samples 80 is not below --train-iters 10 \(80 samples\): ",
        ),
        (
            "--lr-warmup-samples 80 --train-samples 80",
            r"^--lr-warmup-samples 80 is not below --train-samples 80: ",
        ),
        (
            "--lr-wsd-decay-samples 8 --lr-wsd-decay-style linear",
            r"^--lr-wsd-decay-samples 8 and --lr-wsd-decay-style linear without --lr-decay-style "
            r"WSD \(now linear\): add it, or leave --lr-wsd-decay-samples and --lr-wsd-decay-style "
            r"out$",
        ),
        (
            "--lr-decay-style cosine --lr-wsd-decay-iters 8",
            r"^--lr-wsd-decay-iters 8 without --lr-decay-style WSD \(now cosine\)",
        ),
        (
            "--lr-decay-style WSD --lr-decay-iters 8",
            r"^--lr-decay-style WSD without the length of its tail: add --lr-wsd-decay-iters or ",
        ),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 0",
            r"^--lr-wsd-decay-iters is 0: expected 1 to 1,000,000,000$",
        ),
        (
            "--lr-decay-style WSD --lr-wsd-decay-samples 0",
            r"^--lr-wsd-decay-samples is 0: expected 1 to 1,000,000,000,000$",
        ),
        (
            "--lr-decay-style WSD --lr-decay-samples 100 --lr-warmup-iters 2 "
            "--lr-wsd-decay-samples 85",
            r"^--lr-wsd-decay-samples 85 is above --lr-decay-samples 100 less --lr-warmup-iters 2 "
            r"\(16 samples\): expected at most 84 samples",
        ),
        (
            "--lr-decay-style WSD --train-iters 10 --lr-wsd-decay-iters 11",
            r"^--lr-wsd-decay-iters 11 \(88 samples\) is above --train-iters 10 \(80 samples\): ",
        ),
        (
            "--lr-decay-style inverse-square-root",
            r"^--lr-decay-style inverse-square-root without a warm-up",
        ),
        (
            "--lr-decay-style inverse-square-root --lr-warmup-samples 0",
            r"^--lr-decay-style inverse-square-root without a warm-up",
        ),
    ],
)
def test_refuses(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        run(f"--global-batch-size 8 {flags}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--lr-decay-style WSD --train-iters 10 --lr-wsd-decay-iters 10",
        "--lr-decay-style WSD --train-iters 10 --lr-warmup-iters 4 --lr-wsd-decay-iters 6",
    ],
)
def test_a_tail_may_fill_the_decay(flags: str) -> None:
    assert run(flags).schedule.decay_samples == 10
