"""Checkpoints under kills, damage and full or foreign folders: what is loaded is always whole."""

import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import RanksFailed
from tests.harness.slices import slow_but
from tests.integration.engines import beside, small_runner
from tests.integration.test_resume import weights

LAYOUT = beside({}, {"dp": 2})
MOCK = {"overrides": ("language.hidden_size=32", "language.num_layers=2", "vision.hidden_size=32")}
# More by MIMO_KILLS=30; each costs the start of three ranks.
KILLS = int(os.environ.get("MIMO_KILLS", "6"))


def parts(**model: Any) -> tuple[Any, Any]:
    """A rank's engine and what of it is saved."""

    engine = small_runner(LAYOUT, **(MOCK | model))
    return engine, engine


def saver(root: Path, **settings: Any) -> Any:
    """A checkpointer of this rank."""
    from megatron_mimo.checkpoint.checkpointer import Checkpointer
    from megatron_mimo.checkpoint.config import SaveConfig

    return Checkpointer(parts()[1], SaveConfig(root=root, **settings), {})


def progress(iteration: int) -> Any:
    """That many iterations of four samples."""
    from megatron_mimo.checkpoint.progress import Progress

    return Progress(iteration, 4 * iteration)


def load_into(made: Any, root: Path, **settings: Any) -> Any:
    """What `--load` does."""
    from megatron_mimo.checkpoint.checkpointer import load
    from megatron_mimo.checkpoint.config import LoadConfig

    return load(made, LoadConfig(root=root, **settings))


# -- kills -----------------------------------------------------------------------------------------


def save_until_killed(root: str, victim: int, after_s: float, in_background: bool) -> None:
    """Save again and again; one rank is killed at some moment after the first save."""
    import torch.distributed as dist

    checkpoints = saver(Path(root), in_background=in_background, keep_last=2)

    def kill() -> None:
        time.sleep(after_s)
        os.kill(os.getpid(), signal.SIGKILL)

    for iteration in range(1, 1000):
        checkpoints.save(progress(iteration), {0: {"step": iteration}})
        if not in_background or iteration > 1:
            announced = iteration - 1 if in_background else iteration
            if dist.get_rank() == 0:
                # The kill may come in here too.
                (Path(root) / "announcing").write_text(str(announced))
                (Path(root) / "announcing").replace(Path(root) / "announced")
            if announced == 1 and dist.get_rank() == victim:
                threading.Thread(target=kill, daemon=True).start()


def load_after_kill(root: str) -> int:
    """The iteration that a new run goes on from; it saves there too."""
    _, made = parts()
    loaded = load_into(made, Path(root))
    iteration: int = loaded.progress.iteration
    checkpoints = saver(Path(root))
    checkpoints.save(progress(iteration + 1), {0: {"step": 0}})
    return iteration


@pytest.mark.parametrize("attempt", slow_but(range(KILLS), 0, 1))
def test_a_kill_while_saving_loses_nothing_that_was_announced(
    attempt: int, run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    chance = random.Random(attempt)
    victim, after_s = chance.randrange(LAYOUT.world_size), chance.uniform(0, 1.0)
    with pytest.raises(RanksFailed, match="SIGKILL"):
        run_ranks(
            LAYOUT.world_size, save_until_killed, str(tmp_path), victim, after_s, attempt % 2 == 1
        )
    announced = int((tmp_path / "announced").read_text())
    found = set(run_ranks(LAYOUT.world_size, load_after_kill, str(tmp_path)))
    assert len(found) == 1
    assert found.pop() >= announced
    assert not list(tmp_path.glob(".saving-*"))


# -- damage ----------------------------------------------------------------------------------------


def damage_each(root: str) -> list[tuple[str, str, str | None]]:
    """(file, damage, error or None when it was loaded) of each file of a checkpoint."""
    import torch.distributed as dist

    saver(Path(root)).save(progress(5), {0: {"step": 5}})
    engine, made = parts(seq_length=64)
    before = weights(engine)
    folder = Path(root) / "iter_0000005"
    found = []
    for name in sorted(path.name for path in folder.iterdir()):
        for how in ("cut", "flipped", "deleted"):
            whole = (folder / name).read_bytes()
            dist.barrier()
            if dist.get_rank() == 0:
                _damage(folder / name, how)
            dist.barrier()
            error = None
            try:
                load_into(made, Path(root))
            except ValueError as raised:
                error = str(raised)
                assert weights(engine) == before, (name, how)
            dist.barrier()
            if dist.get_rank() == 0:
                (folder / name).write_bytes(whole)
            found.append((name, how, error))
    return found


def _damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "deleted":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[:-1])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.slow
def test_each_damaged_file_is_named_and_no_weight_changes(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    results = run_ranks(LAYOUT.world_size, damage_each, str(tmp_path), timeout=120)
    names = {name for name, _, _ in results[0]}
    assert {".metadata", "common.pt", "loader.json", "metadata.json", "checksums.json"} <= names
    assert sum(name.endswith(".distcp") for name in names) == LAYOUT.world_size
    for found in results:
        for name, how, error in found:
            # A bit in a checksum accuses the file that it is of.
            named = name if name != "checksums.json" or how != "flipped" else "iter_0000005"
            # The list's last byte is a line's end, which says nothing.
            if (name, how) == ("checksums.json", "cut"):
                assert error is None
                continue
            assert error is not None and named in error, (name, how, error)


# -- other models, other folders -------------------------------------------------------------------


def load_with(root: str, model: dict[str, Any], settings: dict[str, Any]) -> str:
    """Save as one model and load as another; what it says."""
    saver(Path(root), without_optimizer=settings.pop("no_save_optim", False)).save(
        progress(5), {0: {"step": 5}}
    )
    try:
        load_into(parts(**model)[1], Path(root), **settings)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (
            {"overrides": (*MOCK["overrides"], "language.ffn_hidden_size=256")},
            {},
            ["mlp.linear_fc1.weight is [2, 512, 32], the model's is [2, 256, 32]"],
        ),
        ({"overrides": (*MOCK["overrides"], "vision.num_layers=3")}, {}, ["vision_model.decoder"]),
        ({}, {"no_save_optim": True}, ["optimizer.state.exp_avg", "--no-load-optim"]),
        ({}, {"no_save_optim": True, "without_optimizer": True}, []),
        ({}, {"no_save_optim": True, "finetune": True}, []),
    ],
)
def test_what_a_model_lacks_is_listed(
    model: dict[str, Any],
    settings: dict[str, Any],
    words: list[str],
    run_ranks: Callable[..., list],
    tmp_path: Path,
) -> None:
    for message in run_ranks(LAYOUT.world_size, load_with, str(tmp_path), model, settings):
        assert bool(message) == bool(words)
        assert all(word in message for word in words), message


def save_into_a_full_disk(root: str, disk: str, in_background: bool) -> str:
    """Save once, then find the disk full."""
    checkpoints = saver(Path(root), in_background=in_background)
    checkpoints.save(progress(1), {0: {"step": 1}})
    checkpoints.finish()
    import torch.distributed as dist

    if dist.get_rank() == 0:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        Path(disk, "filler").write_bytes(b"x" * max(free - 20_000, 0))
    dist.barrier()
    try:
        checkpoints.save(progress(2), {0: {"step": 2}})
        while checkpoints.is_saving:
            checkpoints.poll()
    except RuntimeError as error:
        return str(error)
    finally:
        # What a failed write leaves behind must not be what a later collection stumbles on.
        gc.collect()
        checkpoints.close()
    return ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """Twelve megabytes of memory as a file system."""
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_one_error_and_the_checkpoint_before_stays(
    in_background: bool, run_ranks: Callable[..., list], small_disk: Path
) -> None:
    root = small_disk / "checkpoints"
    for message in run_ranks(3, save_into_a_full_disk, str(root), str(small_disk), in_background):
        assert "the checkpoint of iteration 2 could not be written" in message
        assert "No space left" in message
    (small_disk / "filler").unlink()
    assert set(run_ranks(3, load_after_kill, str(root))) == {1}


# -- in the background -----------------------------------------------------------------------------


def hold(module: Any, name: str) -> threading.Event:
    """Let a function wait until the event is set."""
    original, go_on = getattr(module, name), threading.Event()

    def waiting(*args: Any) -> Any:
        assert go_on.wait(30)
        setattr(module, name, original)
        return original(*args)

    setattr(module, name, waiting)
    return go_on


def train_while_files_wait(root: str) -> None:
    """A step is made before the first byte is written."""
    from megatron_mimo.checkpoint.checkpointer import Checkpointer
    from megatron_mimo.checkpoint.config import SaveConfig
    from megatron_mimo.checkpoint.sharded_files import ShardedWriter
    from tests.integration.engines import mock_data, mock_loader
    from tests.integration.test_resume import steps

    engine, made = parts(seq_length=64)
    loader = mock_loader(LAYOUT, mock_data(global_batch_size=4))
    checkpoints = Checkpointer(made, SaveConfig(root=Path(root), in_background=True), {})
    steps(engine, loader, 0, 1)
    before = weights(engine)
    go_on = hold(ShardedWriter, "write")
    reader = {"step": [1]}
    checkpoints.save(progress(1), {0: reader})
    reader["step"].append(2)
    steps(engine, loader, 1, 1)
    assert weights(engine) != before
    go_on.set()
    checkpoints.finish()
    loaded = load_into(made, Path(root))
    assert weights(engine) == before
    assert loaded.loader["lanes"][0] == {"step": [1]}
    assert loaded.progress == progress(1)


@pytest.mark.slow
def test_a_checkpoint_holds_what_there_was_when_it_was_taken(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    run_ranks(LAYOUT.world_size, train_while_files_wait, str(tmp_path))


def watch_it_being_published(root: str) -> list[str]:
    """What the log says before publication, and after it."""
    import logging

    import torch.distributed as dist

    from megatron_mimo.checkpoint import checkpointer, folder

    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    checkpointer.logger.addHandler(listener)
    checkpointer.logger.setLevel(logging.INFO)
    tracker = Path(root) / folder.TRACKER
    checkpoints = saver(Path(root), in_background=True, keep_last=1)
    for iteration in (1, 2):
        go_on = hold(folder, "publish")
        checkpoints.save(progress(iteration), {})
        # Saved once, whoever asks twice.
        checkpoints.save(progress(iteration), {})
        for _ in range(20):
            checkpoints.poll()
            time.sleep(0.01)
        assert checkpoints.is_saving
        assert len([line for line in said if line.startswith("successfully")]) == iteration - 1
        assert not tracker.exists() or tracker.read_text() == str(iteration - 1)
        dist.barrier()
        go_on.set()
        while checkpoints.is_saving:
            checkpoints.poll()
            assert checkpoints.is_saving or tracker.read_text() == str(iteration)
        # The next publication is held on rank 0; other ranks have not come by.
        dist.barrier()
    checkpointer.logger.removeHandler(listener)
    assert [path.name for path in Path(root).glob("iter_*")] == ["iter_0000002"]
    return [line.split(" to ")[0] for line in said]


@pytest.mark.slow
def test_a_checkpoint_is_announced_on_every_rank_once_it_is_published(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    for said in run_ranks(LAYOUT.world_size, watch_it_being_published, str(tmp_path)):
        lines = [line for line in said if not line.startswith("removed")]
        assert lines == [
            line
            for iteration in (1, 2)
            for line in (
                f"saving checkpoint at iteration {iteration:7d}",
                f"successfully saved checkpoint from iteration {iteration:7d}",
            )
        ]


def save_with_a_rank_that_cannot(root: str) -> str:
    """Another rank than the first cannot write; the run goes on until it hears of it."""
    import torch.distributed as dist

    from megatron_mimo.checkpoint.sharded_files import ShardedWriter

    checkpoints = saver(Path(root), in_background=True)
    checkpoints.save(progress(1), {0: {"step": 1}})
    checkpoints.finish()
    write = ShardedWriter.write
    if dist.get_rank() == 2:

        def fail(*_: Any) -> None:
            ShardedWriter.write = write  # type: ignore[method-assign]
            raise OSError(5, "Input/output error")

        ShardedWriter.write = fail  # type: ignore[method-assign,assignment]
    checkpoints.save(progress(2), {0: {"step": 2}})
    try:
        checkpoints.save(progress(3), {0: {"step": 3}})
    except RuntimeError as error:
        checkpoints.close()
        assert not checkpoints.is_saving
        return str(error)
    return ""


def test_every_rank_hears_why_a_save_failed(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    for message in run_ranks(LAYOUT.world_size, save_with_a_rank_that_cannot, str(tmp_path)):
        assert "the checkpoint of iteration 2 could not be written" in message
        assert "what was saved before is whole" in message
        assert "rank 2: [Errno 5] Input/output error" in message
    assert set(run_ranks(LAYOUT.world_size, load_after_kill, str(tmp_path))) == {1}
