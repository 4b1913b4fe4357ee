"""Real short runs held against each other: layouts agree, planted faults are found and named."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_mimo.cli import main
from megatron_mimo.topology import Layout
from tests.integration.documents import encode
from tests.integration.engines import (
    beside,
    layout,
    micro_batch_size,
    mock_data,
    mock_loader,
    small_runner,
)
from tests.integration.test_packed_documents import DOCUMENTS, HYBRID

STEPS, SAVED = 4, 2
GLOBAL_BATCH_SIZE = 4
ONE_RANK = layout({}, {})
LAYOUTS = {
    "encoder dp 2, llm dp 2": beside({"dp": 2}, {"dp": 2}),
    "encoder dp 2, llm dp 1": beside({"dp": 2}, {}),
    "encoder tp 2, llm tp 2": beside({"tp": 2}, {"tp": 2}),
    "encoder pp 2, llm pp 2": beside({"pp": 2}, {"pp": 2}),
    "llm cp 2 tp 2": beside({}, {"cp": 2, "tp": 2}),
    "colocated, encoder dp 2, llm tp 2": layout({"dp": 2}, {"tp": 2}),
}


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """A fault in this process for as long as a run lasts."""
    from dataclasses import replace

    from megatron_mimo.model.inputs import InputReader
    from megatron_mimo.modules.projector.projector import Projector
    from megatron_mimo.optim import mimo_optimizer
    from megatron_mimo.training import step

    prepare, forward = InputReader.prepare, Projector.forward

    def undivided(model: Any, num_tokens: int, **rest: Any) -> None:
        mimo_optimizer.finalize_gradients(model, 1, **rest)

    def swapped(reader: Any, microbatches: Any) -> Any:
        # Of microbatch 1 alone: another image's pixels, as a stranger's lane would send.
        changed = [*microbatches]
        if "encoder" in changed[1].inputs:
            images = changed[1].inputs["encoder"]
            images = replace(images, patches=images.patches.flip(0))
            changed[1] = replace(changed[1], inputs={"encoder": images})
        return prepare(reader, changed)

    def without_norm(projector: Any, rows: Any) -> Any:
        with mock.patch.object(projector, "norm", None):
            return forward(projector, rows)

    faults: dict[str, Any] = {
        "none": mock.patch.object(step, "STEPS", 0, create=True),
        "gradients not divided": mock.patch.object(step, "finalize_gradients", undivided),
        "images swapped": mock.patch.object(InputReader, "prepare", swapped),
        "projector without its norm": mock.patch.object(Projector, "forward", without_norm),
    }
    with faults[fault]:
        yield


def run(chosen: Layout, folder: Path, fault: str = "none", **data: Any) -> None:
    """Train on mock data as a rank does, with metrics and the activations of a step."""
    from megatron_mimo.config.loop_config import EvaluationConfig
    from megatron_mimo.training.loop import LoopConfig, train
    from megatron_mimo.watch.activations import ActivationTap
    from megatron_mimo.watch.metrics import MetricsLogger

    engine = small_runner(chosen)
    settings = mock_data(
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=micro_batch_size(chosen, GLOBAL_BATCH_SIZE),
        **data,
    )
    source: Any = mock_loader(chosen, settings)
    loader = ActivationTap(
        source, engine, str(folder / "activations"), first=1, last=STEPS, iteration=SAVED
    )
    logs = engine.topology.is_logging_rank
    with planted(fault), open(os.devnull, "w") as nothing:
        train(
            engine,
            loader,
            lambda: mock_loader(chosen, settings),
            LoopConfig(
                train_iters=STEPS,
                global_batch_size=GLOBAL_BATCH_SIZE,
                log_interval=1,
                # Evaluation runs the same modules in between, and must not be saved.
                evaluation=EvaluationConfig(eval_interval=1, eval_iters=1),
            ),
            MetricsLogger(STEPS, str(folder), nothing) if logs else None,
        )


@pytest.fixture(scope="module")
def reference(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank."""
    folder = tmp_path_factory.mktemp("one-rank")
    run_ranks(1, run, ONE_RANK, folder)
    return folder


def parity(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str]:
    code = main(["parity", *map(str, argv)])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree(
    name: str,
    run_ranks: Callable[..., list],
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_ranks(LAYOUTS[name].world_size, run, LAYOUTS[name], tmp_path)
    code, out = parity(capsys, reference, tmp_path, "--tolerance", "1e-5")
    assert code == 0, out
    assert "PASS: loss within 1e-05" in out
    code, out = parity(capsys, "--tensors", reference / "activations", tmp_path / "activations")
    assert code == 0, out
    assert "at 3 points" in out


def test_samples_without_an_image_have_no_rows(
    run_ranks: Callable[..., list], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = beside({}, {"dp": 2})
    for name, grids in (("a", ONE_RANK), ("b", chosen)):
        (tmp_path / name).mkdir()
        run_ranks(
            grids.world_size, partial_run, grids, tmp_path / name, {"text_only_fraction": 0.5}
        )
    report = tmp_path / "report.json"
    folders = [tmp_path / name / "activations" for name in "ab"]
    code, out = parity(capsys, "--tensors", *folders, "--json", report)
    assert code == 0, out
    points = json.loads(report.read_text())["steps"][str(SAVED)]["points"]
    samples = {point["point"]: len(point["samples"]) for point in points}
    assert samples["logits"] == samples["combined embeddings"] == GLOBAL_BATCH_SIZE
    assert 0 < samples["projector output"] < GLOBAL_BATCH_SIZE


def partial_run(chosen: Layout, folder: Path, data: dict[str, Any]) -> None:
    run(chosen, folder, **data)


@pytest.mark.parametrize(
    ("fault", "curves", "tensors"),
    [
        (
            "gradients not divided",
            "gradient norm beyond 0.0001 first at step 1",
            None,
        ),
        (
            "images swapped",
            "loss beyond 1e-05 first at step 1",
            "the runs differ at projector output: ",
        ),
        (
            # The mock encoder's rows are near what the norm would make of them.
            "projector without its norm",
            "gradient norm beyond 0.0001 first at step 1",
            "the runs differ at projector output: 4 of 4 samples",
        ),
    ],
)
def test_a_planted_fault_is_found_and_named(
    fault: str,
    curves: str,
    tensors: str | None,
    run_ranks: Callable[..., list],
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = beside({}, {"dp": 2})
    run_ranks(chosen.world_size, run, chosen, tmp_path, fault)
    code, out = parity(capsys, reference, tmp_path)
    assert code == 3, out
    assert "FAIL: " in out
    assert curves in out, out
    if tensors is not None:
        code, out = parity(capsys, "--tensors", reference / "activations", tmp_path / "activations")
        assert code == 3, out
        assert f"FAIL: {tensors}" in out


def packed(chosen: Layout, folder: Path, order: int) -> None:
    """One step on documents that share a sequence, in order or, with -1, the last one first."""
    import torch.distributed as dist

    from megatron_mimo.config.presets import model_config
    from megatron_mimo.data import ByteTokenizer, DataConfig, StreamLoader, data_role
    from megatron_mimo.data.samples.sample import Drawn
    from megatron_mimo.media.images import ImageInput
    from megatron_mimo.training.step import train_step
    from megatron_mimo.watch.activations import ActivationTap

    engine = small_runner(chosen, **HYBRID)
    config = DataConfig(
        provider="energon",
        path="fed by hand",
        seq_length=64,
        global_batch_size=2,
        packing_buffer_size=2,
        inputs={"encoder": ImageInput(config=model_config("mock").part("vision").image_config())},
    )
    samples = [encode(document, f"document-{i}") for i, document in enumerate(DOCUMENTS)]
    sequences = [tuple(samples[::order]), tuple(samples[2:4][::order])]
    lanes = data_role(chosen, dist.get_rank())
    streams: Any = {
        lane: iter([Drawn(documents=sequences[i]) for i in range(lane, 2, lanes.num_lanes)])
        for lane in lanes.lanes
    }
    source: Any = StreamLoader(streams, config, lanes, ByteTokenizer())
    loader = ActivationTap(source, engine, str(folder), first=1, last=1, iteration=None)
    train_step(engine, loader, 1, 2)


def test_packed_documents(
    run_ranks: Callable[..., list], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever they stand in it: what a document is does not depend on the others.

    Two are in the step twice, and one has two images, which two ranks encode.
    """
    one, many = tmp_path / "one", tmp_path / "many"
    run_ranks(1, packed, ONE_RANK, one, 1)
    chosen = beside({"dp": 2}, {"tp": 2, "cp": 2})
    run_ranks(chosen.world_size, packed, chosen, many, -1)
    report = tmp_path / "report.json"
    code, out = parity(capsys, "--tensors", one, many, "--json", report)
    assert code == 0, out
    points = json.loads(report.read_text())["steps"]["1"]["points"]
    assert {point["point"]: len(point["samples"]) for point in points} == {
        "projector output": 5,
        "combined embeddings": 7,
        "logits": 7,
    }


def test_two_runs_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, start in (("a", []), ("b", ["--nproc", "2"])):
        folder = tmp_path / name
        finished = subprocess.run(
            [
                *(sys.executable, "-m", "megatron_mimo.cli", "train", *start),
                *("--init", "topology-invariant", "--fp32", "--train-iters", "4"),
                *("--log-interval", "1", "--global-batch-size", "4"),
                *("--tensorboard-dir", str(folder)),
                *("--save-activations", str(folder / "activations")),
            ],
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
    assert parity(capsys, tmp_path / "a", tmp_path / "b")[0] == 0
    # Our event files against our own file: they have float32.
    (tmp_path / "b" / "metrics.jsonl").unlink()
    assert parity(capsys, tmp_path / "a", tmp_path / "b", "--tolerance", "1e-6")[0] == 0
    folders = [tmp_path / name / "activations" for name in "ab"]
    assert parity(capsys, "--tensors", *folders)[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save-activations-step", "3"], "--save-activations-step 3 without --save-activations"),
        (
            ["--save-activations", "x", "--save-activations-step", "0"],
            "--save-activations-step is 0: expected 1 to",
        ),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--nproc", "1", *flags]) == 2
    assert message in capsys.readouterr().err


def refused(folder: Path) -> list[str]:
    from megatron_mimo.watch.activations import ActivationTap

    found = []
    for first, iteration in ((1, 3), (5, 3), (1, 10)):
        with pytest.raises(ValueError) as error:
            ActivationTap(
                None,
                None,
                str(folder),
                first=first,
                last=9,
                iteration=iteration,  # type: ignore[arg-type]
            )
        found.append(str(error.value))
    return found


def test_a_step_that_is_saved_or_behind(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    (tmp_path / "step-00000003").mkdir()
    ((again, behind, beyond),) = run_ranks(1, refused, tmp_path)
    assert "has step 3 already: name another folder, or remove" in again
    assert "--save-activations-step 3: this run has steps 5 to 9" in behind
    assert "--save-activations-step 10: this run has steps 1 to 9" in beyond
