"""Language models of transformers whose data-parallel ranks divide them: `--sharding fsdp2`."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.topology import Layout
from tests.harness.slices import slow_but
from tests.hf.models import CONFIGS
from tests.integration.engines import beside, layout
from tests.integration.test_hf_checkpoints import (
    assert_close,
    resumed,
    straight,
    written,
    written_shorter,
)
from tests.integration.test_hf_families import (
    BATCH,
    PACKED,
    STEPS,
    Row,
    assert_gradients,
    family_of,
    part_of,
)

ROWS: dict[str, Row] = {
    # Three experts on two ranks, replicas of the encoder without images, a frozen tower.
    "odd experts, frozen tower": Row(beside({"dp": 2}, {"dp": 2}), frozen=("vision",)),
    "2:3, frozen tower": Row(beside({"dp": 2}, {"dp": 3}), frozen=("vision",)),
    "one rank": Row(layout({}, {})),
    "llm dp 2": Row(beside({}, {"dp": 2})),
    "2:3": Row(beside({"dp": 2}, {"dp": 3})),
    "colocated": Row(layout({"dp": 2}, {"dp": 2})),
    "micro-batch 2": Row(beside({}, {"dp": 3}), loader={"micro": 2}),
    "recomputed": Row(beside({}, {"dp": 2}), build={"recompute": True}),
    "packed": Row(beside({}, {"dp": 3}), loader=PACKED),
}
ODD = "odd experts, frozen tower"
# With three experts, gradients of the decays of "qwen3_5 moe" are so small that they are off by
# rounding, with "ddp" as well.
THREE = ("gemma4 moe", "qwen3_vl moe")
CASES = [(name, row) for name in CONFIGS for row in ROWS if row != ODD or name in THREE]
FEW = ("2:3", "llm dp 2", "colocated")
FEW_CASES = [(name, row) for name, row in CASES if row in FEW]
EVERYDAY = ("gemma4 moe", ODD)


def saved(
    name: str, folder: str, steps: int, frozen: tuple[str, ...], changes: dict[str, int]
) -> tuple[Any, Any]:
    """Write a folder, and train from it by transformers, but for some parts."""
    from tests.hf.models import build
    from tests.hf.steps import oracle

    model = build(name, **changes)
    model.save_pretrained(folder)
    for path, weight in model.named_parameters():
        weight.requires_grad_(part_of(path, family_of(name)) not in frozen)
    points, gradients, _ = oracle(name, steps, BATCH, model=model, keep=True)
    return points, gradients


@pytest.fixture(scope="module")
def plain(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(Family, steps, row) -> its folder, transformers' curve, the first step's gradients."""

    @cache
    def found(name: str, steps: int, frozen: tuple[str, ...], odd: bool) -> Any:
        folder = tmp_path_factory.mktemp("hf") / "folder"
        arguments = (name, str(folder), steps, frozen, {"num_experts": 3} if odd else {})
        (result,) = run_ranks(1, saved, *arguments, timeout=300)
        return str(folder), *result

    def of(name: str, steps: int, where: str) -> Any:
        return found(name, steps, ROWS[where].frozen, where == ODD)

    return of


@pytest.mark.parametrize("case", slow_but(CASES, EVERYDAY), ids=" on ".join)
def test_every_gradient_of_the_first_step(
    case: tuple[str, str], run_ranks: Callable[..., list], plain: Any
) -> None:
    from tests.hf.steps import called, first_gradients

    name, where = case
    row = ROWS[where]
    folder, _, wanted = plain(name, 3, where)
    named = {"frozen": row.frozen, "build": {"sharding": "fsdp2"} | row.build, **row.loader}
    arguments = (folder, name, row.layout, BATCH)
    found = run_ranks(row.layout.world_size, called, first_gradients, arguments, named, timeout=120)
    assert_gradients(found, wanted)


def follow(run_ranks: Callable[..., list], plain: Any, case: tuple[str, str], steps: int) -> None:
    """Loss and norm of each step are those of transformers."""
    from tests.hf.steps import called, curve

    name, where = case
    row = ROWS[where]
    folder, wanted, _ = plain(name, steps, where)
    arguments = (folder, name, row.layout, steps, BATCH)
    named = {"sharding": "fsdp2", "frozen": row.frozen}
    curves = run_ranks(row.layout.world_size, called, curve, arguments, named, timeout=300)
    for points in curves:
        for step, (found, expected) in enumerate(zip(points, wanted, strict=True)):
            assert found[0] == pytest.approx(expected[0], rel=1e-5), step
            assert found[1] == pytest.approx(expected[1], rel=1e-4), step


def test_the_first_steps_are_those_of_transformers(
    run_ranks: Callable[..., list], plain: Any
) -> None:
    follow(run_ranks, plain, EVERYDAY, 3)


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW_CASES, ids=" on ".join)
def test_curves_are_those_of_transformers(
    case: tuple[str, str], run_ranks: Callable[..., list], plain: Any
) -> None:
    follow(run_ranks, plain, case, STEPS)


LAYOUTS: dict[str, tuple[Layout, str]] = {
    "llm dp 2": (beside({}, {"dp": 2}), "ddp"),
    "llm tp 2 pp 2": (beside({}, {"tp": 2, "pp": 2}), "ddp"),
    "divided by 2": (beside({}, {"dp": 2}), "fsdp2"),
    "divided by 4": (beside({}, {"dp": 4}), "fsdp2"),
}
MOVES = (
    ("llm dp 2", "divided by 2"),
    ("divided by 2", "llm dp 2"),
    ("divided by 4", "llm tp 2 pp 2"),
    ("llm tp 2 pp 2", "divided by 4"),
    ("divided by 2", "divided by 4"),
    ("divided by 2", "divided by 2"),
)
RUNS = [
    (name, dtype, *move)
    for name in ("gemma4 moe", "mistral3", "qwen3_5")
    for dtype in ("float32", "bfloat16")
    for move in MOVES
]
EVERYDAY_RUNS = (
    ("qwen3_5", "bfloat16", "llm dp 2", "divided by 2"),
    ("qwen3_5", "bfloat16", "divided by 2", "llm dp 2"),
)


@pytest.fixture(scope="module")
def folder(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family and dtype -> its folder."""

    @cache
    def of(name: str, dtype: str) -> str:
        path = str(tmp_path_factory.mktemp("hf") / "folder")
        run_ranks(1, written if dtype == "float32" else written_shorter, name, path)
        return path

    return of


@pytest.fixture(scope="module")
def run(
    run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory, folder: Any
) -> Any:
    """Family, dtype and layout -> its folder, what its ranks found, and where they saved."""

    @cache
    def of(name: str, dtype: str, where: str) -> tuple[str, list[Any], Path]:
        root = tmp_path_factory.mktemp("saved")
        chosen, sharding = LAYOUTS[where]
        arguments = (name, folder(name, dtype), chosen, str(root), dtype, sharding)
        found = run_ranks(chosen.world_size, straight, *arguments, timeout=120)
        return folder(name, dtype), found, root

    return of


@pytest.mark.parametrize("case", slow_but(RUNS, *EVERYDAY_RUNS), ids=", ".join)
def test_a_run_goes_on_whatever_the_sharding(
    case: tuple[str, str, str, str], run_ranks: Callable[..., list], run: Any
) -> None:
    import numpy as np

    from tests.integration.state import assemble

    name, dtype, before, after = case
    folder, started, root = run(name, dtype, before)
    chosen, sharding = LAYOUTS[after]
    arguments = (name, folder, chosen, str(root), dtype, sharding)
    ended = run_ranks(chosen.world_size, resumed, *arguments, timeout=120)
    wanted, found = (assemble(state for _, state, _ in ranks) for ranks in (started, ended))
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert np.array_equal(found[key], values), key
    curve, later = started[0][0], [points for points, _, _ in ended]
    if before == after:
        assert later == [points for points, _, _ in started]
    elif dtype == "float32":
        assert_close(curve, later)
    else:
        for points in later:
            for (loss, _), (expected, _) in zip(points, curve, strict=True):
                assert loss == pytest.approx(expected, rel=2.0**-8)


def stored(root: Path) -> dict[str, tuple[Any, ...]]:
    """Shape and dtype of each tensor of a checkpoint."""
    from megatron_mimo.weights.torch_dist import describe

    (folder,) = root.glob("iter_*")
    return {
        key: (tuple(tensor.shape), str(tensor.dtype))
        for key, tensor in describe(folder).tensors.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_say_nothing_of_the_sharding(dtype: str, run: Any) -> None:
    """So whatever reads one, such as an export, reads the other."""
    *_, whole = run("qwen3_5", dtype, "llm dp 2")
    *_, divided = run("qwen3_5", dtype, "divided by 2")
    assert stored(divided) == stored(whole)


def held(folder: str, name: str, chosen: Layout, dtype: str) -> dict[str, int] | None:
    """Numbers of elements of the language model on a rank after a step; None without any."""
    import torch.distributed as dist

    from megatron_mimo.training.step import train_step
    from tests.hf.steps import Steps, runner_of

    runner = runner_of(folder, chosen, dtype=dtype, sharding="fsdp2")
    train_step(runner, Steps(name, chosen, dist.get_rank(), batch=4), 1, 4)
    target = runner.model.target
    if target is None:
        return None
    weights = {
        local.untyped_storage().data_ptr(): local.untyped_storage().nbytes() // 4
        for parameter in target.module.parameters()
        for local in [getattr(parameter, "to_local", lambda p=parameter: p)()]
    }
    return {
        "whole": sum(parameter.numel() for parameter in target.module.parameters()),
        "weights": sum(weights.values()),
        "gradients": sum(buffer.numel() for buffer in target.gradient_buffers),
        "optimizer": sum(one.numel() for one in runner.optimizer.state_tensors(target.name)),
    }


SHARES = [(dtype, where) for dtype in ("float32", "bfloat16") for where in ("2", "4")]


@pytest.mark.parametrize("case", slow_but(SHARES, ("bfloat16", "2")), ids=" by ".join)
def test_each_rank_holds_its_part_of_everything(
    case: tuple[str, str], run_ranks: Callable[..., list], folder: Any
) -> None:
    dtype, number = case
    chosen, _ = LAYOUTS[f"divided by {number}"]
    arguments = (folder("mistral3", dtype), "mistral3", chosen, dtype)
    _, *ranks = run_ranks(chosen.world_size, held, *arguments, timeout=120)
    # Of each weight, all widths being multiples of four.
    share = ranks[0]["whole"] // int(number)
    # Moments, and where weights are short, float32 ones beside them.
    copies = 2 if dtype == "float32" else 3
    for found in ranks:
        assert found["weights"] == found["gradients"] == share
        assert found["optimizer"] == copies * share


def left_out(folder: str, name: str, chosen: Layout) -> tuple[list[bool], bool]:
    """Whether steps were applied, of which the second has a loss that is not finite.

    Returns:
        What was applied, and whether the second step changed any weight or moment.
    """
    import numpy as np
    import torch.distributed as dist

    from megatron_mimo.training.step import train_step
    from tests.hf.steps import Steps, runner_of
    from tests.integration.state import parts_of

    runner = runner_of(folder, chosen, sharding="fsdp2")
    loader, applied, states = Steps(name, chosen, dist.get_rank(), batch=BATCH), [], []
    target = runner.model.target
    for iteration in (1, 2, 3):
        hook = None
        if iteration == 2 and target is not None and target.groups.place.dp == 0:
            hook = target.module.register_forward_hook(lambda *found: found[-1] * float("nan"))
        applied.append(train_step(runner, loader, iteration, BATCH).update.applied)
        if hook is not None:
            hook.remove()
        states.append(parts_of(runner))
    changed = any(
        not np.array_equal(one.values, other.values)
        for one, other in zip(states[0], states[1], strict=True)
    )
    return applied, changed


def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(
    run_ranks: Callable[..., list], folder: Any
) -> None:
    chosen, _ = LAYOUTS["divided by 2"]
    arguments = (folder("mistral3", "bfloat16"), "mistral3", chosen)
    found = run_ranks(chosen.world_size, left_out, *arguments, timeout=120)
    assert found == [([True, False, True], False)] * chosen.world_size


def copies(folder: str, name: str, chosen: Layout, steps: int) -> dict[str, Any]:
    """The weights of which every rank has a copy, after some steps."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from megatron_mimo.training.step import train_step
    from tests.hf.steps import Steps, runner_of

    runner = runner_of(folder, chosen, dtype="bfloat16", sharding="fsdp2")
    loader = Steps(name, chosen, dist.get_rank(), batch=BATCH)
    for step in range(steps):
        train_step(runner, loader, step + 1, BATCH)
    target = runner.model.target
    weights = [] if target is None else list(target.module.named_parameters())
    return {
        name: weight.detach().clone() for name, weight in weights if not isinstance(weight, DTensor)
    }


def test_weights_of_another_dtype_stay_the_same_on_every_rank(
    run_ranks: Callable[..., list], folder: Any
) -> None:
    from tests.hf.steps import called, first_gradients

    name, chosen = "qwen3_5", LAYOUTS["divided by 2"][0]
    path = folder(name, "bfloat16")
    _, *before = run_ranks(chosen.world_size, copies, path, name, chosen, 0, timeout=120)
    _, *after = run_ranks(chosen.world_size, copies, path, name, chosen, 2, timeout=120)
    assert before[0] and all(weight.endswith("A_log") for weight in before[0])
    for weight, values in after[0].items():
        assert values.equal(after[1][weight]), weight
        assert not values.equal(before[0][weight]), weight
    # Each microbatch computes the same in bfloat16, and sums are in float32.
    arguments = (path, name, chosen, BATCH)
    whole, divided = (
        run_ranks(
            chosen.world_size,
            called,
            first_gradients,
            arguments,
            {"build": {"dtype": "bfloat16", "sharding": sharding}},
            timeout=120,
        )
        for sharding in ("ddp", "fsdp2")
    )
    for gradients, wanted in zip(divided, whole, strict=True):
        assert gradients.keys() == wanted.keys()
        for weight, gradient in gradients.items():
            scale = wanted[weight].abs().max().item()
            assert (gradient - wanted[weight]).abs().max().item() <= 1e-5 * scale, weight
