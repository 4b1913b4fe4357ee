"""Dry runs of models of transformers, from folders without weights, against real ranks."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.resolve import resolve
from megatron_mimo.tools.plan.dry_run.command import step_roles
from megatron_mimo.tools.plan.dry_run.roles import distinct_roles
from tests.harness.pool import RunRanks
from tests.unit_tests.media.processors.folders import MODEL_TYPES, save_folder

if TYPE_CHECKING:
    from megatron_mimo.tools.plan.dry_run.result import Exchange, ModuleSize

STAGES = "--llm-pp 2 --llm-tp 2"
EXPERTS = "--llm-dp 2 --llm-ep 2"
CASES = [(name, name, STAGES) for name in MODEL_TYPES] + [
    ("gemma4", "gemma4", EXPERTS),
    ("qwen3_vl_moe", "qwen3_vl", EXPERTS),
    ("qwen3_5_moe", "qwen3_5", EXPERTS),
]


def folder_without_weights(name: str, processor: str, layout: str, path: Path) -> None:
    config = save_folder(processor, path)
    config["model_type"] = name
    text = config["text_config"]
    text["num_hidden_layers"] = 2
    if name == "gemma4":
        text["layer_types"] = ["sliding_attention", "full_attention"]
        text["use_bidirectional_attention"] = "vision"
    if layout == EXPERTS:
        text |= {"num_experts": 4, "moe_intermediate_size": 32}
        text |= {"enable_moe_block": True, "top_k_experts": 2} if name == "gemma4" else {}
        text |= {} if name == "gemma4" else {"num_experts_per_tok": 2}
    (path / "config.json").write_text(json.dumps(config))
    assert not list(path.glob("*.safetensors"))


def flags_of(folder: Path, layout: str) -> list[str]:
    return [
        *f"--model-provider hf --load-hf {folder} {layout} --bf16 --seq-length 512".split(),
        *"--global-batch-size 4 --training-stage stage3 --dataset-provider mock".split(),
        *"--overlap-grad-reduce --device cpu".split(),
    ]


def step_for_real(
    flags: list[str], world_size: int
) -> "tuple[tuple[ModuleSize, ...], tuple[Exchange, ...]]":
    """The step of a dry run, over gloo and with content."""
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_mimo.runtime import Device
    from megatron_mimo.runtime.paper.traffic import Traffic
    from megatron_mimo.tools.plan.dry_run.rank import (
        build,
        exchanges,
        read_tokenizer,
        shortened,
        sizes,
    )
    from megatron_mimo.tools.plan.dry_run.samples import full_step
    from megatron_mimo.training.step import train_step

    class Recorder(TorchDispatchMode):
        traffic = Traffic()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "c10d":
                self.traffic.record(func._opname, args)
            return func(*args, **kwargs or {})

    run = resolve(parse(flags, CommandLine, prog="test").train, world_size)
    assert run.folder is not None
    tokenizer, data = read_tokenizer(run, None)
    loader = full_step(shortened(data, run), run.layout, dist.get_rank(), tokenizer)
    runner = build(run, tokenizer, run.folder.vocab_size, Device("cpu"))
    torch.manual_seed(0)
    for replica in runner.model.replicas:
        for tensor in replica.module.parameters():
            tensor.data.normal_(std=0.02)
    recorder = Recorder()
    with recorder:
        train_step(runner, loader, 1, run.global_batch_size)
    return sizes(runner), exchanges(recorder.traffic)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "processor", "layout"), CASES)
def test_a_step_on_paper_holds_and_sends_what_a_real_one_does(
    name: str, processor: str, layout: str, run_ranks: RunRanks, tmp_path: Path
) -> None:
    folder_without_weights(name, processor, layout, tmp_path)
    world = 5 if layout == STAGES else 3
    flags = flags_of(tmp_path, layout)
    roles = distinct_roles(resolve(parse(flags, CommandLine, prog="test").train, world).layout)
    real = run_ranks(world, step_for_real, flags, world, timeout=300)
    for role, outcome in step_roles(roles, flags, world_size=world, vocab_size=None):
        assert outcome.fault is None, outcome.fault.traceback
        held, sent = real[role.rank]
        assert outcome.modules == held
        assert set(outcome.exchanges) == set(sent)
        assert len(outcome.exchanges) == len(sent)
        assert outcome.activations > 0


def test_divided_language_models_are_counted_and_not_stepped(tmp_path: Path) -> None:
    folder_without_weights("mistral3", "mistral3", STAGES, tmp_path)
    flags = flags_of(tmp_path, "--llm-offset 1 --llm-dp 3 --sharding fsdp2")
    flags.remove("--overlap-grad-reduce")
    flags[flags.index("--global-batch-size") + 1] = "6"
    command = [sys.executable, "-m", "megatron_mimo.cli", "plan"]
    counted, stepped = (
        subprocess.run(
            [*command, *mode, *flags], capture_output=True, text=True, timeout=200, check=False
        )
        for mode in (["--params"], ["--dry-run", "--nproc", "4"])
    )
    whole, held = held_by_hand(tmp_path)
    row = re.search(r"│ language model +│ +([\d,]+) │ +[\d,]+ │ +([\d,]+) │", counted.stdout)
    assert row is not None, counted.stdout + counted.stderr
    assert [int(number.replace(",", "")) for number in row.groups()] == [whole, held]
    assert stepped.returncode == 2
    assert stepped.stderr.startswith(
        "error: --dry-run with --sharding fsdp2: torch's fully_shard does not run on weights "
    )


def held_by_hand(folder: Path) -> tuple[int, int]:
    """Weights of the language model, and those of the first of three ranks, by torch's chunks."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.Mistral3ForConditionalGeneration._from_config(config)
    weights = list(model.model.language_model.parameters())
    if not config.tie_word_embeddings:
        weights.append(model.lm_head.weight)
    whole = sum(weight.numel() for weight in weights)
    return whole, sum(weight.chunk(3)[0].numel() for weight in weights)
