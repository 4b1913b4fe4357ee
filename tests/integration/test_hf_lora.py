"""Adapters of models of transformers equal peft's with torch's AdamW."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.topology import Layout
from tests.harness.slices import slow_but
from tests.integration.engines import beside, layout

RANK, ALPHA, BATCH, STEPS = 4, 10.0, 6, 20
TARGETS: dict[str, tuple[str, ...]] = {
    "gemma4": ("q_proj", "o_proj", "gate_proj", "down_proj"),
    "mistral3": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    "qwen3_5 moe": ("v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "up_proj"),
    "qwen3_vl": ("q_proj", "v_proj", "down_proj"),
}
LAYOUTS: dict[str, Layout] = {
    "one rank": layout({}, {}),
    "llm tp 2 pp 2": beside({}, {"tp": 2, "pp": 2}),
    "2:3": beside({"dp": 2}, {"dp": 3}),
}
CASES = {f"{name} on {where}": (name, where) for name in TARGETS for where in LAYOUTS}


def peft_curve(name: str, root: str) -> list[list[float]]:
    """Train adapters by peft, which begin away from zero; saves the model and both adapters."""
    import peft
    import torch

    from tests.hf.models import build
    from tests.hf.steps import oracle

    model = build(name)
    model.save_pretrained(f"{root}/model")
    chosen = [
        path
        for path, module in model.named_modules()
        if path.startswith("model.language_model.layers.")
        and path.endswith(TARGETS[name])
        and isinstance(module, torch.nn.Linear)
    ]
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=chosen, init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.05)
    adapted.save_pretrained(f"{root}/first")
    # What peft trains, and nothing else, has gradients.
    points, _, _ = oracle(name, STEPS, BATCH, model=adapted, keep=True)
    adapted.save_pretrained(f"{root}/last")
    return points


def our_curve(name: str, root: str, chosen: Layout) -> tuple[list[list[float]], dict[str, Any]]:
    """The same by our runner, and on one rank the adapters at the end, by peft's names."""
    import torch.distributed as dist

    from megatron_mimo.config.model_file import read_folder
    from megatron_mimo.model.omni.lora import peft_tables
    from megatron_mimo.modules.lora.config import Lora
    from megatron_mimo.modules.lora.exchange import export_adapters
    from megatron_mimo.training.foreign import load_adapters
    from megatron_mimo.training.step import train_step
    from tests.hf.steps import Steps, runner_of

    lora = Lora(rank=RANK, alpha=ALPHA, targets={"language": frozenset(TARGETS[name])})
    folder = f"{root}/model"
    runner = runner_of(folder, chosen, frozen=("vision", "projector"), lora=lora)
    found = read_folder("hf", folder)
    assert found is not None
    load_adapters(runner, found.model, f"{root}/first")
    loader = Steps(name, chosen, dist.get_rank(), batch=BATCH)
    points = []
    for step in range(STEPS):
        metrics = train_step(runner, loader, step + 1, BATCH)
        points.append([metrics.agreed_loss, metrics.update.grad_norm])
    if chosen.world_size > 1:
        return points, {}
    tables = peft_tables(found.model, text_alone=False)
    factors = dict(export_adapters(runner.model.target.module, tables["llm"]))
    return points, {
        f"base_model.model.{layer}.{kind}.weight": factor.clone()
        for layer, pair in factors.items()
        for kind, factor in zip(("lora_A", "lora_B"), pair, strict=True)
    }


@pytest.fixture(scope="module")
def peft_runs(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family -> where its model and adapters are, and peft's curve."""
    found: dict[str, tuple[Path, list[list[float]]]] = {}

    def of(name: str) -> tuple[Path, list[list[float]]]:
        if name not in found:
            root = tmp_path_factory.mktemp("lora")
            (points,) = run_ranks(1, peft_curve, name, str(root), timeout=200)
            found[name] = root, points
        return found[name]

    return of


@pytest.mark.parametrize("case", slow_but(CASES, "mistral3 on llm tp 2 pp 2"))
def test_curves_and_adapters_are_those_of_peft(
    case: str, run_ranks: Callable[..., list], peft_runs: Any
) -> None:
    from safetensors.torch import load_file

    name, where = CASES[case]
    root, wanted = peft_runs(name)
    chosen = LAYOUTS[where]
    for points, adapters in run_ranks(
        chosen.world_size, our_curve, name, str(root), chosen, timeout=200
    ):
        for step, (found, expected) in enumerate(zip(points, wanted, strict=True)):
            assert found[0] == pytest.approx(expected[0], rel=1e-5), step
            assert found[1] == pytest.approx(expected[1], rel=1e-4), step
        if adapters:
            theirs = load_file(root / "last" / "adapter_model.safetensors")
            assert adapters.keys() == theirs.keys()
            for path, factor in theirs.items():
                assert (adapters[path] - factor).abs().max().item() < 1e-4, path
