"""Whole folders of small models: weights, processor, tokenizer, chat template."""

import json
from pathlib import Path
from typing import Any

from tests.unit_tests.media.processors.folders import save_folder

# Family -> the one whose processor it has, and what its configuration has more.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_GEMMA4_LAYERS = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": ("gemma4", _GEMMA4_LAYERS),
    "gemma4 moe": (
        "gemma4",
        _GEMMA4_LAYERS
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
        | {"moe_intermediate_size": 32},
    ),
    "llava_onevision": ("llava_onevision", {"num_hidden_layers": 2}),
    "mistral3": ("mistral3", {"num_hidden_layers": 2}),
    "qwen3_5": ("qwen3_5", _LINEAR),
    "qwen3_5 moe": ("qwen3_5", _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3_vl": ("qwen3_vl", {"num_hidden_layers": 2}),
    "qwen3_vl moe": ("qwen3_vl", {"num_hidden_layers": 2, "decoder_sparse_step": 1} | _EXPERTS),
}


def write_whole(name: str, folder: Path, *, dtype: str = "float32") -> None:
    """Write a folder with random weights, which are always the same."""
    import torch
    import transformers

    from megatron_mimo.modules.hf.family import family_of

    like, more = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    config = save_folder(like, folder)
    processor: Any = transformers.AutoProcessor.from_pretrained(folder)
    tokenizer = processor.tokenizer
    text = config["text_config"] | more | {"vocab_size": len(tokenizer)}
    if "vocab_size_per_layer_input" in text:
        text["vocab_size_per_layer_input"] = len(tokenizer)
    model_type = f"{like}_moe" if name.endswith("moe") and like.startswith("qwen") else like
    config |= {"model_type": model_type, "text_config": text}
    settings = transformers.AutoConfig.for_model(**config)
    torch.manual_seed(3)
    model = getattr(transformers, family_of(model_type).model_class)(settings)
    for weight in model.parameters():
        # Answers of small random weights are one word over and over.
        if weight.dim() > 1:
            weight.data.mul_(3.0)
    # What ends a turn in the templates, as published folders name it.
    turn = {"gemma4": "<turn|>", "mistral3": "<eos>"}.get(like, "<|im_end|>")
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(turn)]
    model.generation_config.eos_token_id = sorted(set(ends))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
