"""`megatron-mimo checkpoint inspect`: what it shows, and what it refuses."""

import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.cli import main
from megatron_mimo.config.presets import model_config
from tests.integration.engines import beside, small_runner

ITERATION, SAMPLES = 7, 56
LAYOUT = beside({"dp": 2}, {"dp": 2, "ep": 2})
ENGINE: dict[str, Any] = {
    "provider": "nemotron-moe-vlm-tiny",
    "overrides": ("language.pattern=ME*-", "language.ffn_hidden_size=192", "vision.hidden_size=64"),
}


def save(root: Path, optimizer: bool) -> dict[str, int]:
    """Save a run before its first step; elements of this rank's modules, if it holds them whole."""
    from megatron_mimo.checkpoint.checkpointer import Checkpointer
    from megatron_mimo.checkpoint.config import SaveConfig
    from megatron_mimo.checkpoint.progress import Progress

    built = small_runner(LAYOUT, **ENGINE)
    parts = built
    checkpoints = Checkpointer(
        parts, SaveConfig(root=root, without_optimizer=not optimizer), {"model_provider": "tiny"}
    )
    checkpoints.save(Progress(ITERATION, SAMPLES), {})
    if "encoder" not in built.model.modules:
        return {}
    module = built.model.modules["encoder"].module
    found = {}
    for name, part in (("vision_model", module.vision), ("vision_projection", module.projector)):
        found[name] = sum(t.numel() for t in part.state_dict().values() if hasattr(t, "numel"))
    return found


def save_theirs(root: Path) -> None:
    """A checkpoint by megatron-core itself, of a model that is not ours."""
    import signal

    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    folder = root / "iter_0000003"
    folder.mkdir()
    weight = torch.ones(3, 4, dtype=torch.bfloat16)
    state = {
        "weight": ShardedTensor.from_rank_offsets("decoder.weight", weight),
        "moment": ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.decoder.weight", weight.float()
        ),
        "iteration": 3,
        # An object of a class, which is not to be made.
        "args": Namespace(tensor_model_parallel_size=2, world_size=8, exit_signal=signal.SIGTERM),
    }
    dist_checkpointing.save(state, str(folder))
    (root / "latest_checkpointed_iteration.txt").write_text("3")


@pytest.fixture(scope="module")
def saved(
    run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, int]]:
    """A checkpoint of four ranks, and what its encoder holds."""
    root = tmp_path_factory.mktemp("saved")
    return root, run_ranks(LAYOUT.world_size, save, root, True, timeout=120)[0]


@pytest.fixture
def root(saved: tuple[Path, Any], tmp_path: Path) -> Iterator[Path]:
    """A copy of the checkpoint that a test may damage."""
    copy = tmp_path / "copy"
    shutil.copytree(saved[0], copy)
    yield copy


def inspect(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["checkpoint", "inspect", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def size(number: int) -> str:
    """Bytes as tables have them, of a small model."""
    return f"{number / 2**10:.1f} KiB" if number < 2**20 else f"{number / 2**20:.1f} MiB"


def row(out: str, *cells: str) -> list[str]:
    """The cells of the one table row that begins with some."""
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in out.splitlines()]
    (found,) = [found for found in rows if tuple(found[: len(cells)]) == cells]
    return found


def test_it_shows_the_run_and_its_grids(
    saved: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = inspect(capsys, str(saved[0]))
    lines = out.splitlines()
    assert lines[0].split() == ["checkpoint", str(saved[0] / "iter_0000007")]
    assert lines[1].split() == ["iteration", "7"]
    assert lines[2].split() == ["consumed", "samples", "56"]
    assert "model             tiny" in lines
    assert row(out, "encoder") == ["encoder", "[0, 2)", "1", "1", "1", "2", "1", "1"]
    assert row(out, "llm") == ["llm", "[2, 4)", "1", "1", "1", "2", "2", "1"]
    assert inspect(capsys, str(saved[0] / "iter_0000007")) == out


def test_it_counts_by_module(
    saved: tuple[Path, dict[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, held = saved
    out = inspect(capsys, str(root), "--tensors")
    weights, state = out.split("optimizer's state")
    for name, elements in held.items():
        assert row(weights, name)[2:] == [f"{elements:,}", size(4 * elements), "float32"]
    projector = row(weights, "vision_projection")
    tensors, elements = (int(cell.replace(",", "")) for cell in projector[1:3])
    assert row(state, "vision_projection")[1:] == [
        str(3 * tensors),
        f"{3 * elements:,}",
        size(3 * 4 * elements),
        "float32",
        "exp_avg, exp_avg_sq, fp32_param",
    ]
    # Each once and whole, though two ranks hold it: the router of the one layer with experts.
    (router,) = re.findall(r"^language_model\.\S+router\.weight +float32  (.*)$", out, re.M)
    language = model_config(ENGINE["provider"], ENGINE["overrides"]).part("language")
    assert router == f"[{language.num_moe_experts}, {language.hidden_size}]"
    listed = [line for line in out.splitlines() if line.endswith("]") and "  float32  " in line]
    assert len(listed) == int(row(weights, "in all")[1]) + int(row(state, "in all")[1])


def test_files_and_checksums(saved: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved[0] / "iter_0000007"
    plain, verified = (inspect(capsys, str(folder), *flags) for flags in ([], ["--verify"]))
    for path in folder.iterdir():
        if path.name != "checksums.json":
            assert row(plain, path.name)[2] == "saved"
            assert row(verified, path.name)[2] == "matches"
    assert row(plain, "metadata.json")[1] == f"{(folder / 'metadata.json').stat().st_size} B"


def test_weights_alone(
    run_ranks: Callable[..., list], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(LAYOUT.world_size, save, tmp_path, False, timeout=120)
    assert "optimizer's state" not in inspect(capsys, str(tmp_path))


def test_the_newest_is_the_one_that_the_tracker_names(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "iter_0000007", root / "iter_0000009")
    assert f"{root / 'iter_0000007'}\n" in inspect(capsys, str(root))


def test_a_checkpoint_of_megatron_core(
    run_ranks: Callable[..., list], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    run_ranks(1, save_theirs, tmp_path)
    out = inspect(capsys, str(tmp_path), "--tensors")
    assert "iteration         3\n" in out and "consumed samples  unknown\n" in out
    assert row(out, "all") == ["all", "8", "2", "", "", "", "", ""]
    weights, state = out.split("optimizer's state")
    assert row(weights, "decoder") == ["decoder", "1", "12", "24 B", "bfloat16"]
    assert row(state, "decoder") == ["decoder", "1", "12", "48 B", "float32", "exp_avg"]
    assert re.search(r"^decoder\.weight +bfloat16  \[3, 4\]$", out, re.M)
    assert row(out, "__0_0.distcp")[2] == "none"
    # Before megatron-core 0.19 such facts lay beside the tensors.
    older = tmp_path / "iter_0000003" / "common.pt"
    torch.save({"iteration": 2, "args": Namespace(consumed_train_samples=5)}, older)
    out = inspect(capsys, str(tmp_path))
    assert "iteration         2\n" in out and "consumed samples  5\n" in out
    assert main(["checkpoint", "inspect", str(tmp_path), "--verify"]) == 2
    assert "checksums.json is not there" in capsys.readouterr().err


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "damage", "flags", "message"),
    [
        ("__0_0.distcp", Path.unlink, [], "is missing"),
        ("__0_0.distcp", shorten, [], "were saved"),
        ("__0_0.distcp", flip, ["--verify"], "its bytes have changed"),
        ("common.pt", Path.unlink, [], "is missing"),
        ("common.pt", lambda path: path.write_bytes(bytes(path.stat().st_size)), [], "cannot be"),
        (".metadata", Path.unlink, [], "is missing"),
        (".metadata", lambda path: path.write_bytes(b"no pickle"), [], "cannot be read"),
        (".metadata", lambda path: path.write_bytes(b""), [], "cannot be read"),
        ("checksums.json", lambda path: path.write_text("{"), [], "cannot be read"),
        ("checksums.json", lambda path: path.write_text('{"a": 1}'), [], "cannot be read"),
    ],
)
def test_damage_is_one_line_that_names_the_file(
    name: str,
    damage: Callable[[Path], Any],
    flags: list[str],
    message: str,
    root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(root / "iter_0000007" / name)
    assert main(["checkpoint", "inspect", str(root), *flags]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {root / 'iter_0000007' / name} ") and message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["__0_0.distcp", "__2_0.distcp"])
def test_missing_shards_are_found_without_checksums(
    name: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = root / "iter_0000007"
    (folder / "checksums.json").unlink()
    inspect(capsys, str(root))
    (folder / name).unlink()
    assert main(["checkpoint", "inspect", str(folder)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {folder / name} is missing")


@pytest.mark.parametrize("text", ["", "x", "12"])
def test_so_is_a_tracker_that_leads_nowhere(
    text: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = root / "latest_checkpointed_iteration.txt"
    tracker.write_text(text)
    assert main(["checkpoint", "inspect", str(root)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tracker} ")


def test_wrong_usage_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for argv, message in (
        ([], "megatron-mimo checkpoint inspect PATH: expected one PATH, got 0"),
        (["a", "b"], "megatron-mimo checkpoint inspect PATH: expected one PATH, got 2"),
        (["a", "--tensor"], "unknown flag --tensor: the nearest is --tensors"),
        ([str(tmp_path / "absent")], f"{tmp_path / 'absent'} is not there"),
        ([str(tmp_path / "file")], f"{tmp_path / 'file'} is a file"),
        ([str(tmp_path)], f"{tmp_path} holds neither latest_checkpointed_iteration.txt nor"),
    ):
        assert main(["checkpoint", "inspect", *argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {message}")
        assert len(err.splitlines()) == 1
