"""`megatron-mimo data bench`: it reads what training reads, and names the stage that is slow."""

import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_mimo.cli import main
from megatron_mimo.config.flags import parse
from megatron_mimo.data.reading.webdataset import prepare, write_shard
from megatron_mimo.data.samples.digits import DigitsConfig, write_digits_dataset
from megatron_mimo.tools.data.bench import Counts, needed
from megatron_mimo.tools.data.inspect import InspectCommandLine, settings, survey
from megatron_mimo.tools.data.timing import Stage, StageClock
from megatron_mimo.topology import Layout, ModuleGridSpec

SAMPLES = 48


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DigitsConfig(num_train=SAMPLES, num_val=8, val_fraction=16 / 1797, seed=5)
    return write_digits_dataset(tmp_path_factory.mktemp("data") / "digits", config)


def bench(capsys: pytest.CaptureFixture[str], path: Path, *flags: str) -> dict[str, Any]:
    assert main(["data", "bench", str(path), "--json", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("packing", [(), ("--packing-buffer-size", "10")])
def test_the_counts_are_those_of_inspect(
    packing: tuple[str, ...], digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A shuffle buffer mixes the samples of a pass with those of the next one.
    flags = ("--seq-length", "128", "--shuffle-buffer-size", "0", *packing)
    found = bench(capsys, digits, "--samples", str(SAMPLES), *flags)
    line = parse(list(flags), InspectCommandLine, prog="inspect")
    seen, _ = survey(*settings(str(digits), line.train), line)
    assert seen.samples == SAMPLES
    images = sum(number * count for number, count in seen.images.counts.items())
    tokens = sum(number * count for number, count in seen.positions.counts.items())
    assert found["skipped"] == seen.num_bad == 0
    if not packing:
        # Sequences of several samples may begin another pass.
        assert (found["samples"], found["tokens"]) == (SAMPLES, tokens)
        assert found["items"] == {"encoder": images}
        assert found["passes"] == 1
    else:
        assert found["samples"] >= SAMPLES > found["sequences"]
        assert found["stage_seconds"]["pack"] > 0
    assert sum(found["stage_seconds"].values()) == pytest.approx(found["seconds"], rel=0.1)


def picture(side: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def dataset(folder: Path, sample: Mapping[str, bytes]) -> Path:
    (folder / "train").mkdir(parents=True)
    write_shard(folder / "train/0.tar", ((str(i), sample) for i in range(6)))
    prepare(folder, ["train/0.tar"])
    return folder


def text(**fields: str) -> bytes:
    return json.dumps(fields).encode()


SMALL = text(question="<image>", answer="abc")
SLOW: dict[str, dict[str, bytes]] = {
    "decode": {"png": picture(1200), "json": SMALL},
    "tokenise": {"png": picture(32), "json": text(question="<image>", answer="word " * 60_000)},
    # What follows the end of an image is read and not decoded.
    "read": {"png": picture(32) + bytes(40_000_000), "json": SMALL},
}


@pytest.mark.parametrize("stage", SLOW)
def test_the_slow_stage_is_named(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each dataset is made slow in one stage."""
    path = dataset(tmp_path / "data", SLOW[stage])
    flags = ("--shuffle-buffer-size", "0", "--seq-length", "400000")
    assert bench(capsys, path, "--samples", "6", *flags)["limit"] == stage


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        ("pack", "megatron_mimo.data.loader.sequences.plan_round"),
        ("collate", "megatron_mimo.data.loader.stream_loader.collate_packed"),
    ],
)
def test_a_delay_counts_for_the_stage_that_has_it(
    stage: str,
    step: str,
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No data make these two slow, so that a delay is added to what each of them calls."""
    undelayed, delays = resolve_name(step), []

    def delayed(*args: Any) -> Any:
        delays.append(0.02)
        time.sleep(0.02)
        return undelayed(*args)

    monkeypatch.setattr(step, delayed)
    flags = ("--seq-length", "128", "--packing-buffer-size", "10")
    found = bench(capsys, digits, "--samples", str(SAMPLES), *flags)
    assert found["stage_seconds"][stage] >= sum(delays) > 0


def test_what_is_said(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--seconds", "0.4", "--step-time", "1e-6", "--llm-dp", "2", "--seq-length", "128")
    assert main(["data", "bench", str(digits), *flags]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "one process: 5 times 0.1 s, after a warm-up of 0.04 s" in out
    for name in ("samples/s", "tokens/s", "images/s", "read", "decode", "tokenise", "limits: it"):
        assert name in out, name
    assert "samples were read" in out
    assert "on each rank of the encoder, which reads 2 lanes" in out
    assert "on each rank of the language model, which reads 1 lane (" in out


def test_processes_follow_from_the_lanes_of_a_rank() -> None:
    stages = dict.fromkeys(Stage, 0.0) | {Stage.READ: 1.0, Stage.DECODE: 3.0, Stage.COLLATE: 9.0}
    whole = Counts(seconds=13.0, samples=100, sequences=100, stages=stages)
    encoder = ModuleGridSpec(name="encoder", dp=2)
    llm = ModuleGridSpec(name="llm", dp=4, offset=2)
    layout = Layout.of(encoder, llm, world_size=6)
    of_encoder, of_llm = needed(whole, layout, per_lane=10, step_time=0.25)
    # Two lanes of ten sequences, 40 ms each; batches are collated elsewhere.
    assert (of_encoder.lanes, of_encoder.processes) == (2, 4)
    assert of_encoder.seconds == pytest.approx(0.8)
    # Images are not decoded there.
    assert (of_llm.lanes, of_llm.processes) == (1, 1)
    assert of_llm.seconds == pytest.approx(0.1)


def test_time_counts_for_the_innermost_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = StageClock()
    with clock.of(Stage.READ), clock.of(Stage.DECODE):
        pass
    assert clock.seconds[Stage.READ] == 1.0 + 3.0
    assert clock.seconds[Stage.DECODE] == 2.0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "megatron-mimo data bench DATASET: expected one DATASET, got 0"),
        (["nowhere"], "nowhere"),
        (["nowhere", "--seconds", "0"], "--seconds is 0: expected more than 0"),
        (["x", "--llm-dp", "2", "--global-batch-size", "3"], "--global-batch-size 3 is not a mul"),
        (["x", "--step-tim", "1"], "unknown flag --step-tim: the nearest is --step-time"),
    ],
)
def test_wrong_usage_of_bench_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "bench", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert message in err
