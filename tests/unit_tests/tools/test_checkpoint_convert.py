"""`megatron-mimo checkpoint convert`: both ways exact, and strict about what is whose."""

import contextlib
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.cli import main
from megatron_mimo.topology import Layout, ModuleGridSpec
from tests.integration.engines import beside, layout
from tests.unit_tests.model.omni.peer import write_omni
from tests.unit_tests.model.omni.test_omni_weights import changed, edit_weights

PATTERN = "ME*-"


def with_audio(chosen: Layout, audio: dict[str, int]) -> Layout:
    """A layout with an audio encoder on its first ranks."""
    encoder, llm = chosen.modules.values()
    return Layout.of(
        encoder, ModuleGridSpec(name="audio", **audio), llm, world_size=chosen.world_size
    )


LAYOUTS = {
    "llm ep 2": with_audio(beside({"dp": 2}, {"dp": 2, "ep": 2}), {"dp": 2}),
    "tp 2 each": with_audio(layout({"tp": 2}, {"tp": 2, "ep": 2}), {"tp": 2}),
    "pp 2 each": with_audio(beside({"pp": 2}, {"pp": 2}), {}),
}


def convert(source: Path, target: Path, hf: Path | None = None) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    argv = ["checkpoint", "convert", "--from", str(source), "--to", str(target)]
    argv += [] if hf is None else ["--hf", str(hf)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def command(*argv: str | Path) -> str:
    """What a conversion prints, started as users start it."""
    started = [sys.executable, "-m", "megatron_mimo.cli", "checkpoint", "convert", *map(str, argv)]
    done = subprocess.run(started, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_source(folder: Path) -> None:
    """A folder with audio, video and a tokenizer."""
    write_omni(folder, PATTERN, vision={"layerscale_value": 0.3, "num_hidden_layers": 4})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("x")


def write_short(folder: Path) -> None:
    """One whose weights are bfloat16, those aside that models keep in float32."""
    write_source(folder)

    def shorten(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not name.endswith(("A_log", ".D", "correction_bias")):
                tensors[name] = tensor.bfloat16()

    edit_weights(folder, shorten)


def round_trip(folder: Path) -> list[Any]:
    """What both conversions say, and what they change."""
    said = [convert(folder / "in", folder / "saved")]
    said.append(convert(folder / "saved", folder / "out", folder / "in"))
    return [*said, changed(folder / "in", folder / "out")]


def test_there_and_back_is_exact(
    run_ranks: Callable[..., list], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, write_source, tmp_path / "in")
    source, root = tmp_path / "in", tmp_path / "saved"
    assert command("--from", source, "--to", root) == (
        f"wrote the weights of {source}, as iteration 0, to {root}\n"
    )
    assert sorted(path.name for path in root.iterdir()) == [
        "iter_0000000",
        "latest_checkpointed_iteration.txt",
    ]
    assert main(["checkpoint", "inspect", str(root), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "iteration         0\n" in shown and "optimizer" not in shown
    back = command(f"--from={root}", "--to", tmp_path / "out", "--hf", source)
    assert back == f"wrote the weights of {root / 'iter_0000000'} to {tmp_path / 'out'}\n"
    assert run_ranks(1, changed, source, tmp_path / "out") == [[]]
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == (source / name).read_text()


def test_so_it_is_in_bf16(
    run_ranks: Callable[..., list], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, write_short, tmp_path / "in")
    ((there, back, differing),) = run_ranks(1, round_trip, tmp_path)
    assert (there[0], there[2], back[0], back[2]) == (0, "", 0, "")
    assert differing == []
    assert main(["checkpoint", "inspect", str(tmp_path / "saved")]) == 0
    assert "bfloat16, float32" in capsys.readouterr().out


def trained(chosen: Layout, source: Path, root: Path, later: Path) -> None:
    """A run that begins with `root`'s weights, changes every one, and saves in `later`."""
    import torch

    from megatron_mimo.checkpoint.checkpointer import Checkpointer, load
    from megatron_mimo.checkpoint.config import LoadConfig, SaveConfig
    from megatron_mimo.checkpoint.progress import Progress
    from megatron_mimo.model.config import Frozen
    from megatron_mimo.model.mimo import BuildConfig
    from megatron_mimo.model.omni import read_omni
    from megatron_mimo.modules.language import ExecutionConfig
    from megatron_mimo.optim.config import AdamConfig, ScheduleConfig
    from megatron_mimo.runtime import Device
    from megatron_mimo.training.runner import StepConfig, build_runner
    from megatron_mimo.weights.folder import WeightFolder

    with WeightFolder(source) as folder:
        config = read_omni(folder)
    built = build_runner(
        chosen,
        config.model,
        Frozen(),
        BuildConfig(
            params_dtype=torch.float32,
            seed=3,
            init="megatron",
            vocab_size=config.vocab_size,
            seq_length=64,
            sequence_parallel=True,
            execution=ExecutionConfig(),
        ),
        AdamConfig(
            lr=1e-3, min_lr=0.0, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip_grad=1.0
        ),
        ScheduleConfig(style="constant", warmup_samples=0, decay_samples=8),
        StepConfig(
            placeholder_ids={"encoder": config.image_token_id, "audio": 9}, validate_data=False
        ),
        device=Device("cpu"),
    )
    parts = built
    assert load(parts, LoadConfig(root=root, finetune=True)) is not None
    with torch.no_grad():
        for replica in built.model.replicas:
            for parameter in replica.module.parameters():
                parameter.mul_(1.25)
    checkpoints = Checkpointer(parts, SaveConfig(root=later), {})
    checkpoints.save(Progress(6, 48), {})


def expected(source: Path, folder: Path) -> None:
    """The same change in one process."""
    import torch

    from megatron_mimo.model.omni.whole import WholeOmni

    model = WholeOmni(source)
    with torch.no_grad():
        for part in model.parts.values():
            for parameter in part.parameters():
                parameter.mul_(1.25)
    model.save(folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_between_them(name: str, run_ranks: Callable[..., list], tmp_path: Path) -> None:
    source, root, later, out = (tmp_path / at for at in ("in", "saved", "later", "out"))
    run_ranks(1, write_source, source)
    assert run_ranks(1, convert, source, root)[0][0] == 0
    chosen = LAYOUTS[name]
    run_ranks(chosen.world_size, trained, chosen, source, root, later, timeout=120)
    assert run_ranks(1, convert, later, out, source)[0][0] == 0
    run_ranks(1, expected, source, tmp_path / "expected")
    assert run_ranks(1, changed, tmp_path / "expected", out) == [[]]
    (differing,) = run_ranks(1, changed, source, out)
    assert len(differing) > 50


@pytest.fixture(scope="module")
def converted(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its checkpoint, and sources of other models."""
    folder = tmp_path_factory.mktemp("converted")
    run_ranks(1, write_source, folder / "in")
    run_ranks(1, write_omni, folder / "longer", "ME*-M")
    run_ranks(1, write_other, folder / "wider")
    run_ranks(1, convert, folder / "in", folder / "saved")
    return folder


def write_other(folder: Path) -> None:
    """A folder whose language model has larger experts."""
    write_omni(folder, PATTERN, text={"moe_intermediate_size": 32})


@pytest.mark.parametrize(
    ("hf", "message"),
    [("longer", "is missing"), ("wider", "that model's is float32 [")],
)
def test_another_model_is_refused(
    hf: str, message: str, converted: Path, run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    ((code, out, err),) = run_ranks(
        1, convert, converted / "saved", tmp_path / "out", converted / hf
    )
    assert (code, out) == (2, "")
    folder = converted / "saved" / "iter_0000000"
    assert err.startswith(f"error: {folder} does not hold the model of --hf {converted / hf}: ")
    assert message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_damage_is_found_before_anything_is_written(
    converted: Path, run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    root = tmp_path / "saved"
    shutil.copytree(converted / "saved", root)
    file = root / "iter_0000000" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    ((code, out, err),) = run_ranks(1, convert, root, tmp_path / "out", converted / "in")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {file} is not what was saved") and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def run(arguments: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and errors of the command, for each list of arguments."""
    found = []
    for argv in arguments:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = main(["checkpoint", "convert", *argv])
        found.append((code, errors.getvalue()))
    return found


def test_wrong_usage_is_one_line_and_code_2(
    converted: Path, run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    hf, root, out = (str(path) for path in (converted / "in", converted / "saved", tmp_path / "o"))
    (tmp_path / "config.json").write_text("{}")
    cases = (
        (["--to", out], "--from is missing: expected --from PATH --to DIR"),
        (["--from", hf], "--to is missing: expected --from PATH --to DIR"),
        (["--to", out, "--from"], "--from has no value"),
        (["--from", hf, "--to", out, "--hff", hf], "unknown flag --hff: the nearest is --hf"),
        (
            ["--from", root, "--to", out],
            f"--from {root} is a checkpoint: add --hf, the nemotron_h_omni folder that its run "
            f"began from ({hf})",
        ),
        (["--from", hf, "--to", out, "--hf", hf], f"--hf {hf}: --from {hf} is such a folder"),
        (["--from", root, "--to", hf, "--hf", hf], f"--to {hf} is not empty"),
        (
            ["--from", str(tmp_path), "--to", out],
            f"{tmp_path / 'config.json'} describes a model of type None: expected ",
        ),
        (["--from", str(tmp_path / "absent"), "--to", out], f"{tmp_path / 'absent'} is not there"),
    )
    (results,) = run_ranks(1, run, [argv for argv, _ in cases])
    for (code, err), (_, message) in zip(results, cases, strict=True):
        assert code == 2
        assert err.startswith(f"error: {message}")
        assert len(err.splitlines()) == 1
    assert not Path(out).exists()
