"""Adapters equal peft's on the model of transformers with torch's AdamW, in both directions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.topology import Layout
from tests.harness.slices import slow_but
from tests.integration.test_oracle import (
    BETAS,
    GLOBAL_BATCH_SIZE,
    LAYOUTS,
    STEPS,
    begin,
    data_config,
    engine_of,
    follow,
    samples,
)

RANK, ALPHA = 4, 10.0
VISION = {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
TARGETS = {
    "vision": frozenset(VISION),
    "projector": frozenset({"linear_fc1", "linear_fc2"}),
    "language": frozenset(
        VISION | {"in_proj", "out_proj", "shared_experts.linear_fc1", "shared_experts.linear_fc2"}
    ),
}
# Names of the same layers in transformers.
THEIRS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj")
THEIRS += ("up_proj", "down_proj", "fc1", "fc2", "linear_1", "linear_2")


def oracle(root: str) -> list[list[float]]:
    """peft over plain transformers; saves the model, the adapters of before, and of behind.

    The adapters begin away from zero, so that the first gradients of both factors are none either.
    The gradients of the first step are saved in their place too.
    """
    import peft
    import torch

    model = begin(f"{root}/model")
    chosen = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.endswith(THEIRS)
        and name.startswith(("language_model", "vision_model", "multi_modal"))
    ]
    torch.manual_seed(5)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=chosen, init_lora_weights=False),
    )
    trains = {n: weight for n, weight in adapted.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for weight in trains.values():
            weight.normal_(0, 0.05)
    adapted.save_pretrained(f"{root}/first")
    points = []
    for point in follow(adapted, list(trains.values()), f"{root}/model"):
        if not points:
            gradients = {name: weight.grad.clone() for name, weight in trains.items()}
            torch.save(gradients, f"{root}/gradients")
        points.append(point)
    adapted.save_pretrained(f"{root}/last")
    return points


def ours(chosen: Layout, root: str, out: str) -> tuple[list[list[float]], dict[str, Any]]:
    """(loss, gradient norm) of each step, and on one rank the first gradients; saves adapters."""
    import torch
    import torch.distributed as dist

    from megatron_mimo.config.model_file import read_folder
    from megatron_mimo.data import ByteTokenizer, data_role
    from megatron_mimo.data.loader.stream_loader import build_list_loader
    from megatron_mimo.modules.lora.config import Lora
    from megatron_mimo.training.foreign import load_adapters
    from megatron_mimo.training.step import train_step

    folder = f"{root}/model"
    lora = Lora(rank=RANK, alpha=ALPHA, targets=TARGETS)
    engine, parts = engine_of(chosen, folder, lora=lora)
    omni = read_folder("hf", folder)
    assert omni is not None
    load_adapters(parts, omni.model, f"{root}/first")
    loader = build_list_loader(
        samples(), data_config(folder), data_role(chosen, dist.get_rank()), ByteTokenizer()
    )
    points, gradients = [], {}
    for step in range(STEPS):
        metrics = train_step(engine, loader, step + 1, GLOBAL_BATCH_SIZE)
        llm = engine.topology.target
        if llm is not None and llm.is_last_stage:
            points.append([float(metrics.loss), metrics.update.grad_norm])
        if step == 0 and chosen.world_size == 1:
            gradients = {n: g / (1 - BETAS[0]) for n, g in exported(engine, "exp_avg").items()}
    if chosen.world_size == 1:
        torch.save(exported(engine, "fp32_param"), out)
    return points, gradients


def exported(engine: Any, kind: str) -> dict[str, Any]:
    """Whole weights, or what the optimizer has of them, by peft's names, on one rank."""
    import torch

    from megatron_mimo.model.config import ModelConfig
    from megatron_mimo.model.omni.lora import peft_tables
    from megatron_mimo.modules.lora.apply import lora_adapters
    from megatron_mimo.modules.lora.exchange import export_adapters

    states = engine.optimizer.param_states()
    modules = {replica.name: replica.config for replica in engine.model.replicas}
    tables = peft_tables(ModelConfig(modules=modules), text_alone=False)
    found = {}
    for replica in engine.model.replicas:
        held = [
            weight
            for _, adapter in lora_adapters(replica.module)
            for weight in adapter.parameters()
        ]
        kept = [weight.detach().clone() for weight in held]
        with torch.no_grad():
            for weight in held:
                weight.copy_(states[weight.data_ptr()].tensors[kind].view_as(weight))
            for layer, factors in export_adapters(replica.module, tables[replica.name]):
                for name, factor in zip(("lora_A", "lora_B"), factors, strict=True):
                    found[f"base_model.model.{layer}.{name}"] = factor.clone()
            for weight, before in zip(held, kept, strict=True):
                weight.copy_(before)
    return found


@pytest.fixture(scope="module")
def peft_run(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of everything that peft has written, and its curve."""
    root = tmp_path_factory.mktemp("peft")
    (points,) = run_ranks(1, oracle, str(root), timeout=300)
    return root, points


@pytest.mark.parametrize("name", slow_but(LAYOUTS, "one rank"))
def test_losses_norms_and_gradients_are_those_of_peft(
    name: str, run_ranks: Callable[..., list], peft_run: Any, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    (root, wanted), chosen = peft_run, LAYOUTS[name]
    found = run_ranks(
        chosen.world_size, ours, chosen, str(root), str(tmp_path / "out"), timeout=200
    )
    curves = [points for points, _ in found if points]
    assert curves
    for points in curves:
        for step, (point, expected) in enumerate(zip(points, wanted, strict=True)):
            assert point[0] == pytest.approx(expected[0], rel=1e-5), step
            assert point[1] == pytest.approx(expected[1], rel=1e-4), step
    if chosen.world_size > 1:
        return
    gradients = found[0][1]
    theirs = torch.load(root / "gradients")
    named = {name.replace(".default.weight", ""): value for name, value in theirs.items()}
    assert gradients.keys() == named.keys() and len(gradients) > 50
    for key, value in named.items():
        difference = (gradients[key] - value).abs().max()
        assert difference <= 1e-4 * value.abs().max(), key
    weights = torch.load(tmp_path / "out")
    last = load_file(root / "last" / "adapter_model.safetensors")
    assert {f"{name}.weight" for name in weights} == last.keys()
    for key, value in weights.items():
        assert (value - last[f"{key}.weight"]).abs().max() < 1e-4, key
