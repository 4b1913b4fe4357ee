"""--dataloader-save and --dataloader-load: the data goes on where it stood, model or no model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.checkpoint.folder import LOADER, TRACKER, latest_iteration

MOCK = [
    *("--override", "language.num_layers=1", "--override", "language.hidden_size=32"),
    *("--override", "vision.num_layers=1", "--override", "vision.hidden_size=32"),
]
STEPS = 9
LAYOUTS = {
    "one encoder rank, two lanes": (3, ["--llm-dp", "2"]),
    "dp 2 each": (4, ["--encoder-dp", "2", "--llm-dp", "2"]),
    "tensor parallel": (3, ["--llm-tp", "2"]),
}
# 8 samples a step and lane; a worker says where it stands every 64.
BATCH = ["--micro-batch-size", "4", "--log-interval", "100"]


def trained(flags: list[str]) -> tuple[int, int]:
    """What `main` does on a rank; the iterations behind which the run began and ended."""
    import os

    import torch.distributed as dist

    from megatron_mimo.config.flags import CommandLine, parse
    from megatron_mimo.config.resolve import resolve
    from megatron_mimo.runtime import Device
    from megatron_mimo.runtime.setup import RuntimeContext
    from megatron_mimo.training.leaving import LeaveRequest
    from megatron_mimo.training.loop import train
    from megatron_mimo.training.setup import build_trainer

    os.environ["OMP_NUM_THREADS"] = "1"
    rank, size = dist.get_rank(), dist.get_world_size()
    config = parse([*MOCK, *BATCH, *flags], CommandLine, prog="train").train
    context = RuntimeContext(rank=rank, local_rank=rank, world_size=size, device=Device("cpu"))
    trainer = build_trainer(resolve(config, size), context)
    try:
        result = train(
            trainer.runner,
            trainer.loader,
            trainer.eval_loader,
            trainer.loop,
            None,
            trainer.checkpoints,
            LeaveRequest(config.training.stop.exit_duration_in_mins),
        )
        return trainer.loop.progress.iteration, result.iteration
    finally:
        trainer.loader.close()
        if trainer.checkpoints is not None:
            trainer.checkpoints.close()


def run(run_ranks: Callable[..., list], layout: str, *flags: str) -> tuple[int, int]:
    size, grids = LAYOUTS[layout]
    batch = "8" if "--llm-tp" in grids else "16"
    line = [*grids, "--global-batch-size", batch, *flags]
    (ends,) = set(run_ranks(size, trained, line, timeout=180))
    found: tuple[int, int] = ends
    return found


def samples(folder: Path) -> dict[str, list[Any]]:
    """Of every rank that reads, what it read in each step."""
    return {
        path.name: [json.loads(line)["sample_keys"] for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("rank-*.jsonl"))
    }


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    from megatron_mimo.data.samples.digits import DigitsConfig, write_digits_dataset

    config = DigitsConfig(num_train=256, num_val=16, val_fraction=16 / 1797, seed=5)
    return str(write_digits_dataset(tmp_path_factory.mktemp("digits") / "digits", config))


def source(provider: str, digits: str) -> list[str]:
    if provider == "mock":
        return ["--text-only-fraction", "0.25"]
    workers = provider.removeprefix("energon ")
    return [
        *("--dataset-provider", "energon", "--data-path", digits, "--num-workers", workers),
        *("--shuffle-buffer-size", "30"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "provider"),
    [
        ("one encoder rank, two lanes", "mock"),
        ("one encoder rank, two lanes", "energon 2"),
        ("dp 2 each", "energon 0"),
        ("tensor parallel", "energon 2"),
    ],
)
def test_a_new_model_sees_the_rest_of_the_data(
    layout: str, provider: str, digits: str, run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    data = source(provider, digits)
    traces = {name: tmp_path / name for name in ("straight", "first", "second")}
    lengths = {"straight": STEPS, "first": STEPS - 3, "second": 3}
    positions = str(tmp_path / "positions")
    for name, more in (
        ("straight", []),
        ("first", ["--dataloader-save", positions]),
        ("second", ["--dataloader-load", positions]),
    ):
        flags = ["--train-iters", str(lengths[name]), "--sample-trace-dir", str(traces[name])]
        assert run(run_ranks, layout, *data, *flags, *more) == (0, lengths[name])
    found = {name: samples(folder) for name, folder in traces.items()}
    assert len(found["straight"]) >= 2
    for rank, steps in found["straight"].items():
        assert len(steps) == STEPS
        assert found["first"][rank] == steps[:-3]
        assert found["second"][rank] == steps[-3:]
        assert found["second"][rank] != steps[:3]
    assert sorted(path.name for path in Path(positions).iterdir()) == [
        ".lock",
        f"iter_{STEPS - 3:07d}",
        TRACKER,
    ]


def test_positions_stand_beside_checkpoints(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    layout = "one encoder rank, two lanes"
    save, positions = tmp_path / "checkpoints", tmp_path / "positions"
    straight = tmp_path / "straight"
    run(run_ranks, layout, "--train-iters", "8", "--sample-trace-dir", str(straight))
    flags = [
        *("--save", str(save), "--load", str(save), "--save-interval", "2", "--keep-last", "2"),
        *("--dataloader-save", str(positions), "--dataloader-load", str(positions)),
        "--async-save",
    ]
    ends = run(run_ranks, layout, *flags, "--train-iters", "5")
    assert ends == (0, 5)
    for folder in (save, positions):
        assert latest_iteration(folder) == 5
        assert sorted(path.name for path in folder.glob("iter_*")) == [
            "iter_0000004",
            "iter_0000005",
        ]
    assert (positions / "iter_0000005" / LOADER).read_bytes() == (
        save / "iter_0000005" / LOADER
    ).read_bytes()
    # Back to an earlier checkpoint: the position that belongs to it, although there is a newer one.
    (save / TRACKER).write_text("4")
    trace = tmp_path / "back"
    ends = run(run_ranks, layout, *flags, "--train-iters", "8", "--sample-trace-dir", str(trace))
    assert ends == (4, 8)
    for rank, steps in samples(straight).items():
        assert samples(trace)[rank] == steps[4:]
    # The data of the newest, the weights of the oldest, by name.
    more = ["--load", str(save), "--train-iters", "9", "--dataloader-load"]
    trace = tmp_path / "chosen"
    (save / TRACKER).write_text("8")
    chosen = str(positions / "iter_0000006")
    run(run_ranks, layout, *more, chosen, "--sample-trace-dir", str(trace))
    for rank, steps in samples(straight).items():
        assert samples(trace)[rank] == steps[6:7]


@pytest.mark.slow
def test_weights_alone_and_the_rest_of_the_data(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    """--finetune begins the model anew; a folder of checkpoints says where the data stood too."""
    layout, save = "one encoder rank, two lanes", tmp_path / "checkpoints"
    straight, trace = tmp_path / "straight", tmp_path / "trace"
    run(run_ranks, layout, "--train-iters", "5", "--sample-trace-dir", str(straight))
    run(run_ranks, layout, "--train-iters", "3", "--save", str(save))
    load = ["--load", str(save), "--finetune", "--dataloader-load", str(save)]
    ends = run(run_ranks, layout, *load, "--train-iters", "2", "--sample-trace-dir", str(trace))
    assert ends == (0, 2)
    for rank, steps in samples(straight).items():
        assert samples(trace)[rank] == steps[3:]


def refused(flags: list[str]) -> str:
    """What a run says that does not begin."""
    try:
        trained(flags)
    except ValueError as error:
        return str(error)
    return ""


def refusals(run_ranks: Callable[..., list], *flags: str) -> set[str]:
    size, grids = LAYOUTS["one encoder rank, two lanes"]
    line = [*grids, "--global-batch-size", "16", "--train-iters", "1", *flags]
    return set(run_ranks(size, refused, line, timeout=120))


@pytest.mark.slow
def test_positions_that_do_not_fit_are_refused(
    digits: str, run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    mock, energon = str(tmp_path / "mock"), str(tmp_path / "energon")
    layout = "one encoder rank, two lanes"
    run(run_ranks, layout, "--train-iters", "1", "--dataloader-save", mock)
    data = source("energon 2", digits)
    run(run_ranks, layout, *data, "--train-iters", "1", "--dataloader-save", energon)
    other = source("energon 1", digits)
    for flags, message in (
        ([*data, "--dataloader-load", mock], "the checkpoint's data was not read with energon"),
        (["--dataloader-load", energon], "--dataset-provider mock cannot go on: the checkpoint's"),
        (
            [*other, "--dataloader-load", energon],
            "shared by --llm-dp 2 x --num-workers 2, and the product must stay 4: set --num-w",
        ),
    ):
        for said in refusals(run_ranks, *flags):
            assert said.startswith(f"--dataloader-load {flags[-1]}: ")
            assert message in said


@pytest.mark.slow
def test_damaged_positions_are_refused(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    positions = tmp_path / "positions"
    layout, flags = "one encoder rank, two lanes", ["--dataloader-load", str(positions)]
    run(
        run_ranks,
        layout,
        *("--train-iters", "2", "--save-interval", "1", "--dataloader-save", str(positions)),
    )
    assert sorted(path.name for path in positions.glob("iter_*")) == [
        "iter_0000001",
        "iter_0000002",
    ]
    file = positions / "iter_0000002" / LOADER
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content, what in ((whole[:-1], "bytes, "), (flipped, "its bytes have changed")):
        file.write_bytes(content)
        (said,) = refusals(run_ranks, *flags)
        assert str(file) in said and what in said and "iterations 1 are there too" in said
    file.unlink()
    (said,) = refusals(run_ranks, *flags)
    assert f"{file} is missing" in said
    (said,) = refusals(run_ranks, "--dataloader-load", str(positions / "iter_0000009"))
    assert "iter_0000009 is not there" in said


@pytest.mark.slow
def test_a_folder_without_positions_changes_nothing(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    """So that the same command starts and goes on."""
    layout, positions = "one encoder rank, two lanes", str(tmp_path / "positions")
    both = ["--dataloader-save", positions, "--dataloader-load", positions]
    straight, trace = tmp_path / "straight", tmp_path / "trace"
    run(run_ranks, layout, "--train-iters", "4", "--sample-trace-dir", str(straight))
    for _ in range(2):
        run(run_ranks, layout, "--train-iters", "2", *both, "--sample-trace-dir", str(trace))
    assert samples(trace) == samples(straight)


@pytest.mark.slow
def test_a_run_that_leaves_early_says_where_the_data_stood(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    flags = ["--train-iters", "50", "--exit-duration-in-mins", "0"]
    layout = "one encoder rank, two lanes"
    assert run(run_ranks, layout, *flags, "--dataloader-save", str(tmp_path)) == (0, 1)
    assert latest_iteration(tmp_path) == 1


def save_until_the_disk_is_full(save: str, positions: str) -> str:
    """Two checkpoints, of which the second finds no place after its position found one."""
    import torch.distributed as dist

    from megatron_mimo.checkpoint import folder as folders
    from megatron_mimo.checkpoint.checkpointer import Checkpointer
    from megatron_mimo.checkpoint.config import ReaderConfig, SaveConfig
    from megatron_mimo.checkpoint.progress import Progress
    from tests.integration.engines import layout, small_runner

    engine = small_runner(layout({}, {}), overrides=tuple(MOCK[1::2]))
    parts = engine
    readers = ReaderConfig(save=Path(positions), keep_last=1)
    checkpoints = Checkpointer(parts, SaveConfig(root=Path(save), keep_last=1), {}, readers)
    checkpoints.save(Progress(1, 4), {0: {"step": 1}})
    publish = folders.publish

    def full(staged: Path, root: Path, iteration: int) -> None:
        if root == Path(save):
            raise OSError(28, "No space left on device")
        publish(staged, root, iteration)

    folders.publish = full
    try:
        checkpoints.save(Progress(2, 8), {0: {"step": 2}})
    except RuntimeError as error:
        return str(error)
    finally:
        folders.publish = publish
        checkpoints.close()
        dist.barrier()
    return ""


@pytest.mark.slow
def test_the_position_of_the_last_checkpoint_outlives_a_save_that_fails(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    save, positions = tmp_path / "checkpoints", tmp_path / "positions"
    (said,) = run_ranks(1, save_until_the_disk_is_full, str(save), str(positions))
    assert "the checkpoint of iteration 2 could not be written" in said
    assert latest_iteration(save) == 1
    assert (positions / "iter_0000001").is_dir()
    assert latest_iteration(positions) == 2


def two_savers(folder: str) -> list[str]:
    """A second run that saves there, and one once the first has ended."""
    import torch.distributed as dist

    from megatron_mimo.checkpoint.config import ReaderConfig
    from megatron_mimo.checkpoint.readers import ReaderSaver

    config, group = ReaderConfig(save=Path(folder)), dist.new_group(backend="gloo")
    first, said = ReaderSaver(config, group), []
    try:
        ReaderSaver(config, group)
    except ValueError as error:
        said.append(str(error))
    first.close()
    ReaderSaver(config, group).close()
    return said


@pytest.mark.slow
def test_two_runs_do_not_save_into_one_folder(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    for said in run_ranks(2, two_savers, str(tmp_path)):
        (message,) = said
        assert message.startswith(f"--dataloader-save {tmp_path}: another run saves there")
