"""What models of transformers cannot be trained on is refused before ranks build anything."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.config.architecture import check_shards
from megatron_mimo.model.config import ModelConfig
from megatron_mimo.topology import Layout
from tests.hf.models import CONFIGS
from tests.integration.engines import beside


def architecture(name: str, *, sizes: tuple[int, ...] = (), **changes: Any) -> ModelConfig:
    """The architecture of a tiny model, with changes of its text_config."""
    from megatron_mimo.modules.hf.config import (
        HfEncoderConfig,
        HfLanguageConfig,
        HfTowerConfig,
        describe,
    )

    description = describe(CONFIGS[name](**changes).to_dict())
    tower = HfTowerConfig(description=description)
    return ModelConfig(
        modules={
            "encoder": HfEncoderConfig(vision=tower, projector=tower, folder="folder"),
            "llm": HfLanguageConfig(description=description, stage_layers=sizes),
        }
    )


TWO, FOUR = {"tp": 2}, {"tp": 4}
REFUSED: list[tuple[str, dict[str, Any], Layout, str]] = [
    (
        "gemma4",
        {"hidden_size_per_layer_input": 8},
        beside({}, {"pp": 2}),
        "--llm-pp 2 with text_config.hidden_size_per_layer_input 8: every layer reads embeddings "
        "of its own, so that the model cannot be cut into stages; set --llm-pp 1",
    ),
    (
        "gemma4",
        {"num_kv_shared_layers": 2},
        beside({}, {"pp": 2}),
        "--llm-pp 2 with text_config.num_kv_shared_layers 2: layers use what other layers have "
        "computed, so that the model cannot be cut into stages; set --llm-pp 1",
    ),
    (
        "qwen3_vl",
        {"sizes": (2, 4)},
        beside({}, {"pp": 2}),
        "language.stage_layers begins with 2: features of images enter the first 3 layers, which "
        "have to be on the first stage; give it 3 or more",
    ),
    (
        "qwen3_vl",
        {},
        beside({}, {"pp": 5}),
        "--llm-pp 5: the model has 6 layers, the first 3 of which have to be on one stage; lower "
        "it",
    ),
    (
        "mistral3",
        {"sizes": (1, 3)},
        beside({}, {"pp": 4}),
        "language.stage_layers has 2 numbers: expected 4, as --llm-pp says",
    ),
    (
        "mistral3",
        {},
        beside({}, FOUR),
        "--llm-tp 4 does not divide the model's language.num_key_value_heads, which is 2: change "
        "it",
    ),
    (
        "mistral3",
        {"vocab_size": 255},
        beside({}, TWO),
        "--llm-tp 2 does not divide the model's language.vocab_size, which is 255: change it",
    ),
    (
        "mistral3",
        {"intermediate_size": 127},
        beside({}, TWO),
        "--llm-tp 2: model.language_model.layers.0.mlp.down_proj.weight: 127 does not divide by a "
        "tensor-parallel size of 2: choose another",
    ),
    (
        "gemma4",
        {"hidden_size_per_layer_input": 8},
        beside({}, TWO),
        "--llm-tp 2: model.language_model.layers.0.per_layer_input_gate.weight has no style in the "
        "plan of tensor parallelism that transformers has for this model, and its gradient would "
        "be wrong, or its layer copied: set the tensor-parallel size to 1, or add the weight to "
        "the family's record",
    ),
    (
        "mistral3",
        {},
        beside({}, {"cp": 2}),
        "--llm-cp 2: context parallelism is not supported for this model, whose own forward takes "
        "whole sequences; set it to 1",
    ),
    (
        "mistral3",
        {},
        beside({}, {"dp": 2, "ep": 2}),
        "--llm-ep 2: expert parallelism is not supported for this model; set it to 1",
    ),
    (
        "qwen3_vl moe",
        {},
        beside({}, {"dp": 2, "ep": 2, "tp": 2}),
        "--llm-expt-tp 1 with --llm-tp 2 and --llm-ep 2: the experts of a model of transformers "
        "are divided as its other layers are; set --llm-expt-tp 2",
    ),
    (
        "qwen3_vl moe",
        {"num_experts": 3},
        beside({}, {"dp": 2, "ep": 2}),
        "--llm-ep 2 does not divide the model's language.num_experts, which is 3: change it",
    ),
    (
        "mistral3",
        {},
        beside({"pp": 2}, {}),
        "--encoder-pp 2: the encoder of a mistral3 model is not cut into stages; set it to 1, and "
        "divide it by --encoder-dp or --encoder-tp",
    ),
    (
        "mistral3",
        {},
        beside(FOUR, {}),
        "--encoder-tp 4 does not divide the model's vision.num_attention_heads, which is 2: change "
        "it",
    ),
]


@pytest.mark.parametrize(("name", "changes", "chosen", "message"), REFUSED)
def test_a_layout_is_refused(
    name: str, changes: dict[str, Any], chosen: Layout, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_shards(chosen, architecture(name, **changes))


def sharding(chosen: Layout, model: ModelConfig, *frozen: str, **changes: Any) -> None:
    from megatron_mimo.config.sharding import check_sharding
    from megatron_mimo.model.config import Frozen, ReduceConfig
    from megatron_mimo.modules.lora.config import Lora

    rank = changes.pop("rank", None)
    targets = {"language": frozenset({"q_proj"})}
    lora = rank and Lora(rank=rank, alpha=1.0, dropout=0.0, rslora=False, targets=targets)
    reduce = ReduceConfig(sharding="fsdp2", **changes)
    check_sharding(reduce, chosen, model, Frozen(frozen), lora)


NOT_DIVIDED: list[tuple[dict[str, int], tuple[str, ...], dict[str, Any], str]] = [
    (
        {"dp": 2, axis: 2},
        (),
        {},
        f"--llm-{axis} 2 with --sharding fsdp2: data-parallel ranks alone divide the language "
        f"model then; set --llm-{axis} 1 and raise --llm-dp, or leave --sharding out",
    )
    for axis in ("tp", "pp", "ep")
] + [
    (
        {"dp": 2},
        (),
        {"rank": 4},
        "--lora-rank 4 with --sharding fsdp2: adapters train beside weights that each rank holds "
        "whole; leave one of them out",
    ),
    (
        {"dp": 2},
        ("language",),
        {},
        "--sharding fsdp2 with a language model that does not train, by --training-stage or "
        "--freeze-lm: what is frozen is held whole, so there is nothing to divide; leave "
        "--sharding out",
    ),
    (
        {"dp": 2},
        (),
        {"overlap_grads": True},
        "--overlap-grad-reduce with --sharding fsdp2, which exchanges gradients and weights layer "
        "by layer anyway: leave --overlap-grad-reduce out",
    ),
]


@pytest.mark.parametrize(("llm", "frozen", "changes", "message"), NOT_DIVIDED)
def test_what_replicas_cannot_divide_is_refused(
    llm: dict[str, int], frozen: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sharding(beside({}, llm), architecture("qwen3_vl moe"), *frozen, **changes)


def test_language_models_of_megatron_core_are_not_divided() -> None:
    from megatron_mimo.config.presets import PROVIDERS

    with pytest.raises(ValueError, match=r"^--sharding fsdp2: only language models that run tran"):
        sharding(beside({}, {"dp": 2}), PROVIDERS["mock"]())
    sharding(beside({}, {"dp": 2}), architecture("gemma4 moe"), "vision", "projector")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_takes_tensor_parallelism_of_both_grids(name: str) -> None:
    # Layers of embeddings of their own have no plan: see above.
    check_shards(beside(TWO, {} if name == "gemma4 e-series" else TWO), architecture(name))


@pytest.mark.parametrize(
    "flags",
    [{"recompute_granularity": "selective"}, {"moe_grouped_gemm": True}],
    ids=lambda flags: next(iter(flags)),
)
def test_what_layers_of_transformers_do_not_know_is_refused(flags: dict[str, Any]) -> None:
    from megatron_mimo.config.architecture import language_execution
    from megatron_mimo.config.sections import ModelSection

    with pytest.raises(ValueError, match=r"^--(recompute-granularity selective|moe-grouped-gemm):"):
        language_execution(ModelSection(**flags), architecture("gemma4 moe"))
    whole = ModelSection(recompute_granularity="full")
    assert language_execution(whole, architecture("gemma4 moe")).recompute_granularity == "full"


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl moe"])
def test_a_weight_that_no_plan_covers_is_refused(name: str) -> None:
    from megatron_mimo.modules.hf.config import describe
    from megatron_mimo.modules.hf.cut import language_stage, meta_model
    from megatron_mimo.modules.hf.family import family_of
    from megatron_mimo.modules.hf.tensor_parallel import check_division, language_plan

    config = CONFIGS[name]()
    family = family_of(config.model_type)
    model = meta_model(describe(config.to_dict()))
    plan = dict(language_plan(model, family))
    norm = plan.pop("model.language_model.layers.*.self_attn.q_norm")
    model = language_stage(model, family, 0, 6)
    with pytest.raises(
        ValueError, match=r"^model\.language_model\.layers\.0\.self_attn\.q_norm\.weight has no st"
    ):
        check_division(model, plan, 2, num_experts=4)
    check_division(model, {**plan, "model.language_model.layers.*.self_attn.q_norm": norm}, 2)


def folder(path: Path, name: str = "mistral3", **changes: Any) -> Path:
    """A folder with changed fields of config.json, `section__field`, and one odd weight."""
    import torch
    from safetensors.torch import save_file

    fields = json.loads(CONFIGS[name]().to_json_string(use_diff=False))
    for key, value in changes.items():
        *sections, field = key.split("__")
        place = fields
        for section in sections:
            place = place[section]
        place[field] = value
    (path / "config.json").write_text(json.dumps(fields))
    save_file({"nothing": torch.zeros(1)}, str(path / "model.safetensors"))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "kimi_vl"},
            "describes a model of type 'kimi_vl': expected one of gemma4, ",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is there, only "),
        (
            {"text_config__attention_dropout": 0.1},
            "text_config.attention_dropout is 0.1, which is not supported: set it to 0",
        ),
        (
            {"vision_config__attention_dropout": 0.2},
            "vision_config.attention_dropout is 0.2, which is not supported: set it to 0",
        ),
        (
            {"image_token_id": 256},
            "image_token_id is 256, expected a token from 0 to 255",
        ),
    ],
)
def test_a_folder_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    from megatron_mimo.config.model_file import read_folder

    with pytest.raises(ValueError, match=rf"config\.json:? {re.escape(message)}"):
        read_folder("hf", str(folder(tmp_path, **changes)))


@pytest.mark.parametrize("name", ["qwen3_vl moe", "qwen3_5 moe"])
def test_a_folder_that_balances_experts_is_refused(name: str, tmp_path: Path) -> None:
    from megatron_mimo.config.model_file import read_folder

    with pytest.raises(ValueError, match=r"text_config\.output_router_logits is true, with which"):
        read_folder("hf", str(folder(tmp_path, name, text_config__output_router_logits=True)))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"dtype": "float16", "text_config": {"dtype": "bfloat16"}}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"text_config": {}}, None),
    ],
)
def test_a_folder_says_its_dtype_for_all_or_for_text(
    said: dict[str, Any], expected: str | None
) -> None:
    from megatron_mimo.modules.hf.weights import stored_dtype

    assert stored_dtype(said) == expected


def test_what_flags_ask_of_a_folder_imports_no_megatron_core() -> None:
    # It has to be adapted to a host first, which a command does after it has read the flags.
    asked = ("modules.hf.costs", "modules.hf.tensor_parallel", "model.omni.lora")
    names = ", ".join(f"megatron_mimo.{name}" for name in asked)
    code = f"import sys, {names}; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
