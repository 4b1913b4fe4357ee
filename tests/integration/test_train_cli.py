"""Whole runs through the command line, as a user starts them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mimo.data.reading.webdataset import prepare, read_shard, write_shard
from megatron_mimo.data.samples.digits import DigitsConfig, write_digits_dataset

LOG_LINE = re.compile(
    r"^ iteration +(\d+)/ +(\d+) \| consumed samples: +(\d+) \| "
    r"elapsed time per iteration \(ms\): [\d.]+ \| learning rate: [\d.E+-]+ \| "
    r"global batch size: +(\d+) \| lm loss: ([\d.E+-]+) \| loss scale: 1\.0 \| "
    r"grad norm: [\d.]+ \| number of skipped iterations: +0 \| number of nan iterations: +0 \|",
    re.MULTILINE,
)


def train(*flags: str, nproc: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run `megatron-mimo train` to its end."""
    start = [] if nproc is None else ["--nproc", str(nproc)]
    return subprocess.run(
        [sys.executable, "-m", "megatron_mimo.cli", "train", *start, *flags],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def spoil(dataset: Path, shard: str, key: str, ending: str, data: bytes) -> None:
    """Replace one file of one sample and index the dataset anew."""
    samples = read_shard(dataset / shard)
    assert ending in samples[key]
    samples[key][ending] = data
    write_shard(dataset / shard, samples.items())
    shards = sorted(str(path.relative_to(dataset)) for path in dataset.glob("*/*.tar"))
    prepare(dataset, shards)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    config = DigitsConfig(num_train=64, num_val=16, val_fraction=16 / 1797, seed=5)
    return write_digits_dataset(tmp_path / "digits", config)


def energon(dataset: Path) -> list[str]:
    return [
        *("--dataset-provider", "energon", "--data-path", str(dataset)),
        *("--micro-batch-size", "4", "--global-batch-size", "16"),
        *("--train-iters", "4", "--log-interval", "1"),
    ]


def test_a_run_on_two_grids_logs_and_evaluates(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "tensorboard"
    run = train(
        *("--encoder-dp", "1", "--llm-dp", "2", "--train-iters", "4", "--log-interval", "2"),
        *("--global-batch-size", "4", "--eval-interval", "2", "--eval-iters", "1"),
        *("--lr", "1e-3", "--tensorboard-dir", str(logs), "--load", str(tmp_path / "none")),
        nproc=3,
    )
    assert run.returncode == 0, run.stderr
    # One rank says that a first start finds nothing, and nobody warns of it.
    shown = run.stdout + run.stderr
    assert shown.count(f"{tmp_path / 'none'} has no checkpoint yet: the run starts") == 1
    assert "WARNING" not in shown
    lines = LOG_LINE.findall(run.stdout)
    assert [(i, n, samples, batch) for i, n, samples, batch, _ in lines] == [
        ("2", "4", "8", "4"),
        ("4", "4", "16", "4"),
    ]
    assert "3 ranks, disjoint grids" in run.stdout + run.stderr
    entries = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    losses = {e["iteration"]: e["lm_loss"] for e in entries if "lm_loss" in e}
    assert f"{losses[4]:.6E}" == lines[1][4]
    events = EventAccumulator(str(logs)).Reload()
    scalars = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["lm loss"] == [2, 4]
    assert scalars["lm loss vs samples"] == [8, 16]
    assert scalars["lm loss validation"] == [2, 4]
    assert {"learning-rate", "grad-norm", "batch-size", "iteration-time-ms"} <= set(scalars)


def test_one_process_needs_no_launcher() -> None:
    run = train("--train-iters", "2", "--log-interval", "1", "--bf16")
    assert run.returncode == 0, run.stderr
    assert len(LOG_LINE.findall(run.stdout)) == 2


def test_a_run_over_pipeline_stages_logs_and_evaluates(tmp_path: Path) -> None:
    run = train(
        *("--encoder-pp", "2", "--llm-pp", "2", "--train-iters", "2", "--log-interval", "1"),
        *("--global-batch-size", "4", "--eval-interval", "2", "--eval-iters", "1"),
        *("--encoder-run-ahead", "2", "--check-bridge", "--training-stage", "stage1"),
        nproc=4,
    )
    assert run.returncode == 0, run.stderr
    assert len(LOG_LINE.findall(run.stdout)) == 2
    assert "validation loss at iteration 2" in run.stdout


@pytest.mark.parametrize(
    ("flags", "nproc", "message"),
    [
        (["--trian-iters", "2"], None, "--train-iters"),
        (["--llm-dp", "3"], 2, "needs ranks up to 3, but only 2"),
        (["--encoder-dp", "1", "--llm-dp", "1"], 3, r"ranks \[2, 3\) unused"),
        (["--dataset-provider", "energon", "--data-path", "/nonexistent"], None, "/nonexistent"),
        (["--llm-ep", "2", "--llm-dp", "2"], 3, "--llm-ep 2: expert parallelism is not supported"),
        (["--global-batch-size", "3", "--llm-dp", "2"], 3, "--global-batch-size 3"),
        (["--freeze-vit", "--freeze-lm", "--freeze-projection"], None, "nothing is left to train"),
        (["--override", "language.num_layer=3"], None, "did you mean 'num_layers'"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    flags: list[str], nproc: int | None, message: str
) -> None:
    run = train(*flags, nproc=nproc)
    assert run.returncode == 2, run.stdout + run.stderr
    assert re.search(message, run.stderr)
    assert "Traceback" not in run.stderr
    assert run.stderr.count("error:") == 1, run.stderr


def test_a_corrupt_image_is_skipped_by_both_grids(digits: Path) -> None:
    shard = read_shard(digits / "train/000000.tar")
    key = next(iter(shard))
    spoil(digits, "train/000000.tar", key, "png", shard[key]["png"][:40])
    logs = digits.parent / "tensorboard"
    run = train(*energon(digits), "--tensorboard-dir", str(logs), nproc=2)
    assert run.returncode == 0, run.stderr
    assert len(LOG_LINE.findall(run.stdout)) == 4
    skips = [line for line in run.stderr.splitlines() if f"skips sample '{key}'" in line]
    encoder = [line for line in skips if line.startswith("[rank 0: encoder dp 0] WARNING")]
    language = [line for line in skips if line.startswith("lane 0 skips")]
    assert 0 < len(encoder) == len(language)
    assert "does not decode" in skips[0] and "train/000000.tar" in skips[0]
    entries = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    counts = [entry["data/skipped samples"] for entry in entries]
    # Of one reader of the lane, which may be a step ahead when it is asked.
    assert counts == sorted(counts)
    assert 0 < counts[-1] <= len(language)


def test_a_sample_whose_images_are_missing_in_its_text_stops_the_run(digits: Path) -> None:
    key = next(iter(read_shard(digits / "train/000000.tar")))
    text = {"question": "No placeholder here.", "answer": "1"}
    spoil(digits, "train/000000.tar", key, "json", json.dumps(text).encode())
    run = train(*energon(digits), nproc=2)
    assert run.returncode != 0
    assert key in run.stderr
    assert "0 <image> placeholders and 1 image" in run.stderr


def test_a_run_in_samples_goes_on_with_another_batch(tmp_path: Path) -> None:
    """Ten samples: two batches of four, then one of two."""
    root = tmp_path / "checkpoints"
    flags = ("--train-samples", "10", "--save", str(root), "--load", str(root))
    first = train(*flags, "--global-batch-size", "4", "--exit-interval", "2")
    assert f"{root} has no checkpoint yet" in first.stdout + first.stderr
    second = train(*flags, "--global-batch-size", "2")
    assert "trained 1 iterations after 2 on 10 samples" in second.stdout
    entries = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [entry["consumed_samples"] for entry in entries] == [8, 10]
    assert not list(root.glob("events.*"))
    third = train(*flags, "--global-batch-size", "2")
    assert "trained 0 iterations after 3 on 10 samples" in third.stdout
