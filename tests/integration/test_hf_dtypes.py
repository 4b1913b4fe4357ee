"""Dtypes of models of transformers: of every tensor, of gradient buffers, and of rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.slices import slow_but
from tests.hf.models import CONFIGS
from tests.integration.engines import beside, layout

BATCH, STEPS = 6, 20
# What real folders store in float32 although they are in bfloat16.
WIDE = ("A_log", "dt_bias")
CASES = [(name, dtype) for name in CONFIGS for dtype in ("bfloat16", "float16")]


def mixed(name: str, folder: str, steps: int) -> list[list[float]]:
    """Write a folder in bfloat16 with a few float32 weights; the curve of transformers from it.

    Returns:
        Loss and norm of each step in float32.
    """
    import torch

    from tests.hf.models import build
    from tests.hf.steps import oracle

    def rounded() -> Any:
        model = build(name)
        for path, weight in [*model.named_parameters(), *model.named_buffers()]:
            if not path.endswith(WIDE) and path in model.state_dict():
                weight.data = weight.data.bfloat16().float()
        return model

    model = rounded()
    for path, weight in [*model.named_parameters(), *model.named_buffers()]:
        if not path.endswith(WIDE) and path in model.state_dict():
            weight.data = weight.data.bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    points, _, _ = oracle(name, steps, BATCH, model=rounded())
    return points


def dtypes(folder: str, name: str, dtype: str, frozen: tuple[str, ...]) -> dict[str, Any]:
    """Dtypes of our tensors, of transformers', of gradient buffers and of rows."""
    import json

    import torch
    import transformers

    from megatron_mimo.modules.hf.encoder import HfEncoder
    from megatron_mimo.modules.hf.family import family_of
    from megatron_mimo.training.step import train_step
    from tests.hf.steps import Steps, runner_of

    chosen = layout({}, {})
    runner = runner_of(folder, chosen, dtype=dtype, frozen=frozen)
    ours: dict[str, str] = {}
    buffers, rows = [], []
    for replica in runner.model.replicas:
        module = replica.module
        for path, tensor in [*module.model.named_parameters(), *module.model.named_buffers()]:
            ours[path] = str(tensor.dtype)
        if replica.ddp is not None:
            buffers += [str(buffer.param_dtype) for buffer in replica.ddp.buffers]
        if isinstance(module, HfEncoder):
            module.register_forward_hook(lambda *found: rows.append(str(found[-1].dtype)))
    train_step(runner, Steps(name, chosen, 0, batch=BATCH), 1, BATCH)
    kind = family_of(json.loads(Path(folder, "config.json").read_text())["model_type"]).model_class
    theirs = getattr(transformers, kind).from_pretrained(folder, dtype=getattr(torch, dtype))
    return {
        "ours": ours,
        "theirs": {
            path: str(tensor.dtype)
            for path, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]
        },
        "buffers": buffers,
        "rows": set(rows),
    }


@pytest.fixture(scope="module")
def stored(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(Family, steps) -> its folder, and transformers' curve in float32."""
    found: dict[tuple[str, int], Any] = {}

    def of(name: str, steps: int) -> Any:
        if (name, steps) not in found:
            folder = tmp_path_factory.mktemp("hf") / "folder"
            (points,) = run_ranks(1, mixed, name, str(folder), steps, timeout=300)
            found[name, steps] = (str(folder), points)
        return found[name, steps]

    return of


@pytest.mark.parametrize("case", slow_but(CASES, ("qwen3_5", "bfloat16")), ids=" in ".join)
@pytest.mark.parametrize("frozen", slow_but([(), ("vision",)], ()), ids=["all", "frozen tower"])
def test_every_tensor_has_the_dtype_that_transformers_gives_it(
    case: tuple[str, str], frozen: tuple[str, ...], run_ranks: Callable[..., list], stored: Any
) -> None:
    name, dtype = case
    folder, _ = stored(name, 0)
    (found,) = run_ranks(1, dtypes, folder, name, dtype, frozen, timeout=120)
    wide = {path for path in found["ours"] if path.endswith(WIDE)}
    expected = {path: found["theirs"][path] for path in found["ours"]}
    expected |= dict.fromkeys(wide, "torch.float32")
    # It is no part of a folder, and rounded where it is used.
    scales = {path for path in found["ours"] if path.endswith("embed_scale")}
    expected |= dict.fromkeys(scales, "torch.float32")
    assert found["ours"] == expected
    assert bool(wide) == name.startswith("qwen3_5")
    assert found["rows"] == {f"torch.{dtype}"}
    # A buffer of gradients for each dtype, in each module that trains.
    assert set(found["buffers"]) == {f"torch.{dtype}"} | ({"torch.float32"} if wide else set())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=" in ".join)
def test_losses_in_short_dtypes_are_those_of_float32(
    case: tuple[str, str], run_ranks: Callable[..., list], stored: Any
) -> None:
    from tests.hf.steps import called, curve

    name, dtype = case
    folder, wanted = stored(name, STEPS)
    cut = {} if name == "gemma4 e-series" else {"pp": 2}
    chosen = beside({}, cut)
    arguments = (folder, name, chosen, STEPS, BATCH)
    curves = run_ranks(chosen.world_size, called, curve, arguments, {"dtype": dtype}, timeout=200)
    for points in curves:
        for step, (found, expected) in enumerate(zip(points, wanted, strict=True)):
            # bfloat16 has 8 bits, float16 has 11.
            bound = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
            assert found[0] == pytest.approx(expected[0], rel=bound), step
