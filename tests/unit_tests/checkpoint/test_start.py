"""What a run begins with: refused before it starts where it is named and not there."""

from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.config import FirstWeightsConfig, LoadConfig, ReaderConfig, SaveConfig
from megatron_mimo.checkpoint.start import check_start
from megatron_mimo.cli import main


def saved(root: Path, *iterations: int) -> Path:
    """A folder of checkpoints, as far as this looks."""
    for iteration in iterations:
        staged = folders.staging_folder(root, iteration, "a")
        staged.mkdir(parents=True)
        (staged / folders.METADATA).touch()
        folders.seal(staged, {})
        folders.publish(staged, root, iteration)
    return root


def check(**flags: Any) -> None:
    names = {"save": "save", "load": "load", "finetune": "load", "dataloader_save": "readers"}
    names |= {"dataloader_load": "readers"}
    given: dict[str, dict[str, Any]] = {"save": {}, "load": {}, "readers": {}, "first": {}}
    for name, value in flags.items():
        field = {"save": "root", "load": "root"}.get(name, name.removeprefix("dataloader_"))
        given[names.get(name, "first")][field] = value if name == "finetune" else str(value)
    check_start(
        SaveConfig(**given["save"]),
        LoadConfig(**given["load"]),
        FirstWeightsConfig(**given["first"]),
        ReaderConfig(**given["readers"]),
    )


def test_an_empty_or_missing_folder_begins(tmp_path: Path) -> None:
    check(load=tmp_path)
    check(load=tmp_path / "absent")
    check(load=tmp_path, save=tmp_path)
    # The same command starts and goes on.
    check(dataloader_load=tmp_path, dataloader_save=tmp_path)
    check(dataloader_load=tmp_path / "absent", save=tmp_path / "absent")


def test_what_is_there_is_taken(tmp_path: Path) -> None:
    root = saved(tmp_path / "a", 3)
    for path in (root, root / "iter_0000003"):
        check(load=path)
        check(load=path, finetune=True)
        check(dataloader_load=path)
        check(load_nemotron_checkpoint=path)
        check(load_vision_from=path)
    (root / "iter_0000003").rename(root / "release")
    (root / folders.TRACKER).write_text("release")
    check(load_vision_from=root)


def test_what_is_named_and_not_there_is_refused(tmp_path: Path) -> None:
    absent, empty, lost = (tmp_path / name for name in ("absent", "empty", "lost"))
    empty.mkdir()
    (saved(lost, 3) / folders.TRACKER).unlink()
    begins = "--finetune begins with the weights of a checkpoint"
    for flags, message in (
        ({"load": absent, "finetune": True}, f"--load {absent} is not there: {begins}"),
        ({"load": empty, "finetune": True}, f"--load {empty} holds neither .*: {begins}"),
        ({"load": absent / "iter_0000003"}, "iter_0000003 is not there"),
        ({"load": lost}, f"--load {lost} holds iter_0000003, and no latest_"),
        ({"load": lost, "save": lost}, "which says where to go on: write one of 3 into it, or"),
        ({"dataloader_load": absent}, f"--dataloader-load {absent} is not there: expected a"),
        ({"dataloader_load": absent, "dataloader_save": empty}, "is not there"),
        ({"dataloader_load": lost, "dataloader_save": lost}, "holds iter_0000003, and no latest_"),
        ({"load_hf": absent}, f"--load-hf {absent} is not there"),
        ({"load_nemotron_checkpoint": absent}, "--load-nemotron-checkpoint .*absent is not there"),
        ({"load_vision_from": empty}, "--load-vision-from .*empty holds neither"),
        ({"load_vision_from": lost}, "--load-vision-from .*lost holds iter_0000003, and no latest"),
    ):
        with pytest.raises(ValueError, match=message):
            check(**flags)


def test_what_a_run_left_half_replaced_is_put_back_by_one_that_saves_there(tmp_path: Path) -> None:
    root = saved(tmp_path, 3)
    (root / "iter_0000003").rename(root / ".replaced-0000003")
    check(load=root, save=root)
    with pytest.raises(ValueError, match="go on with --save"):
        check(load=root)


def test_no_rank_starts_and_no_file_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--nproc", "1", "--save", str(tmp_path / "new"), "--finetune", "--load"]
    assert main(["train", *flags, str(tmp_path / "typo")]) == 2
    assert capsys.readouterr().err.startswith(f"error: --load {tmp_path / 'typo'} is not there")
    assert list(tmp_path.iterdir()) == []
