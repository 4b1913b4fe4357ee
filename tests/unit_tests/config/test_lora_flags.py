"""Flags of adapters: what they choose, and one line for what cannot be."""

from typing import Any

import pytest

from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.resolve import Resolved, resolve

HYBRID = "--model-provider nemotron-moe-vlm-tiny --override language.pattern=ME*-"
BASE = f"{HYBRID} --init topology-invariant --lora-rank 4"


def resolved(text: str) -> Resolved:
    return resolve(parse(text.split(), CommandLine, prog="train").train, 1)


def lora(text: str) -> Any:
    return resolved(f"{BASE} {text}").lora


def test_all_linear_layers_of_the_language_model_are_the_default() -> None:
    chosen = lora("")
    assert (chosen.rank, chosen.alpha, chosen.scale) == (4, 4.0, 1.0)
    assert dict(chosen.targets) == {
        "language": {
            *("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
            *("shared_experts.linear_fc1", "shared_experts.linear_fc2"),
        }
    }


def test_targets_are_parts_and_layers_of_parts() -> None:
    given = "--lora-targets projector --lora-targets language.in_proj --lora-targets vision"
    chosen = lora(f"{given} --lora-targets language.shared_experts.linear_fc2")
    assert chosen.targets["projector"] == {"linear_fc1", "linear_fc2"}
    assert chosen.targets["language"] == {"in_proj", "shared_experts.linear_fc2"}
    assert chosen.targets["vision"] == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}


def test_the_scale_is_that_of_peft() -> None:
    import peft
    import torch

    for flags, fields in (
        ("--lora-alpha 6", {}),
        ("--lora-alpha 6 --lora-rslora", {"use_rslora": 1}),
    ):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **fields)
        theirs: Any = peft.get_peft_model(model, config).base_model.model[0]
        assert lora(flags).scale == pytest.approx(theirs.scaling["default"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (f"{HYBRID} --lora-alpha 3", "--lora-alpha"),
        (f"{BASE} --lora-rank 0", "--lora-rank is 0: expected 1"),
        (f"{BASE} --lora-rank 200", "language.in_proj maps 128 to"),
        (f"{BASE} --lora-dropout 1", "--lora-dropout is 1: expected 0 or more, and below 1"),
        (f"{BASE} --lora-targets language.linear_kqv", "did you mean 'language.linear_qkv'"),
        (f"{BASE} --lora-targets linear_qkv", "unknown 'linear_qkv'; did you mean"),
        (f"{BASE} --lora-targets encoder", "unknown 'encoder'"),
        (f"{BASE} --lora-targets language.experts.linear_fc1", "experts behind a router"),
        (f"{BASE} --lora-targets language.router", "experts behind a router, and of the router"),
        (f"{BASE} --freeze-lm", "--lora-rank 4: language is frozen"),
        (f"{BASE} --lora-targets vision --training-stage stage2", "vision is frozen"),
        (
            f"{BASE} --lora-targets projector --llm-only",
            "projector is not in a run with --llm-only",
        ),
        (f"{HYBRID} --lora-rank 4", "--lora-rank 4 without weights to adapt"),
        (f"{BASE} --load-vision-from d", "--load-vision-from d with --lora-rank 4"),
        (f"{BASE} --load-base d --load-nemotron-checkpoint e", "expected at most one of them"),
        (f"{HYBRID} --load-base d", "--load-base"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        resolved(flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
