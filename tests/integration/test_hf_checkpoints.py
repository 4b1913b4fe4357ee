"""Checkpoints of modules of transformers: the same run goes on, on its layout and on others."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.topology import Layout
from tests.harness.slices import slow_but
from tests.integration.engines import beside, layout

BATCH, BEFORE, AFTER = 4, 2, 2
LAYOUTS: dict[str, Layout] = {
    "one rank": layout({}, {}),
    "llm dp 2": beside({}, {"dp": 2}),
    "llm tp 2 pp 2": beside({}, {"tp": 2, "pp": 2}),
    "llm ep 2": beside({}, {"dp": 2, "ep": 2}),
    "llm ep 2 tp 2": beside({}, {"dp": 2, "ep": 2, "tp": 2, "expt_tp": 2}),
    "encoder dp 2": beside({"dp": 2}, {}),
    "encoder tp 2": beside({"tp": 2}, {}),
    "colocated": layout({"dp": 2}, {"pp": 2, "dp": 1}),
}
DENSE = ("gemma4", "mistral3", "qwen3_5", "qwen3_vl")
MOE = ("gemma4 moe", "qwen3_5 moe", "qwen3_vl moe")
MOVES = (
    ("llm tp 2 pp 2", "llm tp 2 pp 2"),
    ("llm tp 2 pp 2", "llm dp 2"),
    ("llm dp 2", "llm tp 2 pp 2"),
    ("colocated", "encoder dp 2"),
)
MOE_MOVES = (
    ("llm ep 2", "llm ep 2"),
    ("llm ep 2", "one rank"),
    ("llm tp 2 pp 2", "llm ep 2 tp 2"),
    ("llm ep 2 tp 2", "llm dp 2"),
)
CASES = [
    *[(name, *move) for name in DENSE for move in MOVES],
    *[(name, *move) for name in MOE for move in (*MOVES, *MOE_MOVES)],
    # The towers of other families are not divided.
    ("gemma4", "encoder tp 2", "colocated"),
]
EVERYDAY = (
    ("gemma4 moe", "llm tp 2 pp 2", "llm ep 2 tp 2"),
    ("qwen3_vl moe", "llm ep 2", "llm ep 2"),
)


def written(name: str, folder: str) -> None:
    from tests.hf.models import build

    build(name).save_pretrained(folder)


def written_shorter(name: str, folder: str) -> None:
    """In bfloat16, with the weights that published folders have in float32."""
    import torch

    from tests.hf.models import build

    model = build(name)
    for path, weight in model.named_parameters():
        if not path.endswith("A_log"):
            weight.data = weight.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)


def steps(runner: Any, loader: Any, first: int, number: int) -> list[list[float]]:
    """(loss, gradient norm) of each step."""
    from megatron_mimo.training.step import train_step

    points = []
    for iteration in range(first + 1, first + number + 1):
        metrics = train_step(runner, loader, iteration, BATCH)
        points.append([metrics.agreed_loss, metrics.update.grad_norm])
    return points


def straight(
    name: str,
    folder: str,
    chosen: Layout,
    root: str,
    dtype: str = "float32",
    sharding: str = "ddp",
) -> tuple[list[list[float]], list[Any], list[Any]]:
    """Curve after a save, and the state at the save and at the end of a run that never stops."""
    import torch.distributed as dist

    from megatron_mimo.checkpoint.checkpointer import Checkpointer
    from megatron_mimo.checkpoint.config import SaveConfig
    from megatron_mimo.checkpoint.progress import Progress
    from tests.hf.steps import Steps, runner_of
    from tests.integration.state import parts_of

    runner = runner_of(folder, chosen, dtype=dtype, sharding=sharding)
    loader = Steps(name, chosen, dist.get_rank(), batch=BATCH)
    steps(runner, loader, 0, BEFORE)
    checkpoints = Checkpointer(runner, SaveConfig(root=Path(root)), {})
    checkpoints.save(Progress(BEFORE, BEFORE * BATCH), {})
    checkpoints.finish()
    saved = parts_of(runner)
    return steps(runner, loader, BEFORE, AFTER), saved, parts_of(runner)


def resumed(
    name: str,
    folder: str,
    chosen: Layout,
    root: str,
    dtype: str = "float32",
    sharding: str = "ddp",
) -> tuple[list[list[float]], list[Any], list[Any]]:
    """The same of a run that begins with what `straight` has saved."""
    import torch.distributed as dist

    from megatron_mimo.checkpoint.checkpointer import load
    from megatron_mimo.checkpoint.config import LoadConfig
    from tests.hf.steps import Steps, runner_of
    from tests.integration.state import parts_of

    runner = runner_of(folder, chosen, dtype=dtype, sharding=sharding)
    loaded = load(runner, LoadConfig(root=Path(root)))
    assert loaded is not None and loaded.progress.iteration == BEFORE
    loader = Steps(name, chosen, dist.get_rank(), batch=BATCH)
    for _ in range(BEFORE):
        loader.next_step()
    found = parts_of(runner)
    return steps(runner, loader, BEFORE, AFTER), found, parts_of(runner)


@pytest.fixture(scope="module")
def saved(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family and layout -> its folder, what its ranks found, and where they saved."""

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp("hf") / "folder"
        run_ranks(1, written, name, str(path))
        return path

    @cache
    def run(name: str, where: str) -> tuple[Path, list[Any], Path]:
        root, chosen = tmp_path_factory.mktemp("saved"), LAYOUTS[where]
        arguments = (name, str(folder(name)), chosen, str(root))
        return folder(name), run_ranks(chosen.world_size, straight, *arguments, timeout=120), root

    return run


@pytest.mark.parametrize("case", slow_but(CASES, *EVERYDAY), ids=", ".join)
def test_a_run_goes_on(
    case: tuple[str, str, str], run_ranks: Callable[..., list], saved: Any
) -> None:
    import numpy as np

    from tests.integration.state import assemble

    name, before, after = case
    folder, started, root = saved(name, before)
    chosen = LAYOUTS[after]
    ended = run_ranks(chosen.world_size, resumed, name, str(folder), chosen, str(root), timeout=120)
    wanted, found = (assemble(state for _, state, _ in ranks) for ranks in (started, ended))
    for moment in ("exp_avg", "exp_avg_sq"):
        assert any(key.startswith(f"optimizer.state.{moment}.") for key in wanted)
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert np.array_equal(found[key], values), key
    curve = started[0][0]
    if before != after:
        assert_close(curve, [points for points, _, _ in ended])
        return
    for (points, _, last), (later_points, _, later_last) in zip(started, ended, strict=True):
        assert later_points == points
        for one, other in zip(last, later_last, strict=True):
            assert np.array_equal(one.values, other.values), one.key


@pytest.mark.slow
def test_so_does_a_run_in_bfloat16_with_weights_in_float32(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    import numpy as np

    from tests.integration.state import assemble

    name, folder, root = "qwen3_5", str(tmp_path / "folder"), str(tmp_path / "run")
    run_ranks(1, written_shorter, name, folder)
    first, second = LAYOUTS["llm tp 2 pp 2"], LAYOUTS["llm dp 2"]
    arguments = (root, "bfloat16")
    started = run_ranks(first.world_size, straight, name, folder, first, *arguments, timeout=120)
    again = run_ranks(first.world_size, resumed, name, folder, first, *arguments, timeout=120)
    assert [points for points, _, _ in again] == [points for points, _, _ in started]
    other = run_ranks(second.world_size, resumed, name, folder, second, *arguments, timeout=120)
    wanted, found = (assemble(state for _, state, _ in ranks) for ranks in (started, other))
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert np.array_equal(found[key], values), key
    assert stored_dtypes(root) == {"A_log": {"float32"}, "in_proj_a.weight": {"bfloat16"}}


def stored_dtypes(root: str) -> dict[str, set[str]]:
    """Dtypes of two kinds of weights in the checkpoint."""
    from megatron_mimo.weights.torch_dist import describe

    (folder,) = Path(root).glob("iter_*")
    found: dict[str, set[str]] = {}
    for key, tensor in describe(folder).tensors.items():
        for kind in ("A_log", "in_proj_a.weight"):
            if key.startswith("llm.") and key.endswith(f"linear_attn.{kind}"):
                found.setdefault(kind, set()).add(str(tensor.dtype).removeprefix("torch."))
    return found


def assert_close(curve: list[list[float]], curves: list[list[list[float]]]) -> None:
    """Sums of gradients in another order part as little as those of layouts do."""
    for points in curves:
        for (loss, norm), (expected, expected_norm) in zip(points, curve, strict=True):
            assert loss == pytest.approx(expected, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
