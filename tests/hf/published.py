"""Folders of models at their published sizes, without weights: what a plan and a dry run need.

Sizes are those of the models' config.json on the Hugging Face Hub. Tokenizer and processor are
those of the small folders, with published sizes of patches and images; a vocabulary of the
published size does not need a tokenizer that uses all of it.

    python -m tests.hf.published gemma4-31b /tmp/gemma4-31b
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.unit_tests.media.processors.folders import save_folder

_GEMMA_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
_GEMMA_TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "global_head_dim": 72,
    "pooling_kernel_size": 3,
    "standardize": True,
}
_QWEN_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "deepstack_visual_indexes": [8, 16, 24],
}
_QWEN_ROPE = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
_QWEN_TEXT = {
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "num_attention_heads": 32,
    "rope_scaling": _QWEN_ROPE,
    "rope_theta": 5000000,
    "vocab_size": 151936,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    # transformers' conversion script of Gemma 4 (convert_gemma4_weights.py), variant gemma-4-31b.
    "gemma4-31b": {
        "model_type": "gemma4",
        "text_config": {
            "hidden_size": 5376,
            "hidden_size_per_layer_input": 0,
            "intermediate_size": 21504,
            "num_hidden_layers": 60,
            "layer_types": _GEMMA_LAYERS * 10,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
            "head_dim": 256,
            "global_head_dim": 512,
            "attention_k_eq_v": True,
            "use_bidirectional_attention": "vision",
            "num_kv_shared_layers": 0,
            "sliding_window": 1024,
            "final_logit_softcapping": 30.0,
            "max_position_embeddings": 262144,
            "vocab_size": 262144,
        },
        "vision_config": _GEMMA_TOWER,
        "audio_config": None,
    },
    # config.json of Qwen/Qwen3-VL-8B-Instruct.
    "qwen3-vl-8b": {
        "model_type": "qwen3_vl",
        "text_config": {
            **_QWEN_TEXT,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
        },
        "vision_config": {**_QWEN_TOWER, "out_hidden_size": 4096},
        "tie_word_embeddings": False,
    },
    # config.json of Qwen/Qwen3-VL-30B-A3B-Instruct.
    "qwen3-vl-30b-a3b": {
        "model_type": "qwen3_vl_moe",
        "text_config": {
            **_QWEN_TEXT,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
        },
        "vision_config": {**_QWEN_TOWER, "out_hidden_size": 2048},
        "tie_word_embeddings": False,
    },
    # config.json of mistralai/Mistral-Small-3.1-24B-Instruct-2503.
    "mistral3-24b": {
        "model_type": "mistral3",
        "spatial_merge_size": 2,
        "text_config": {
            "model_type": "mistral",
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "vision_config": {
            "model_type": "pixtral",
            "head_dim": 64,
            "hidden_size": 1024,
            "image_size": 1540,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
        "tie_word_embeddings": False,
    },
}
_SMALL = {"qwen3_vl_moe": "qwen3_vl"}
# Sizes of the published processors, by the type of the model: paths in processor_config.json.
_PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "gemma4": {
        "image_processor": {"patch_size": 16, "pooling_kernel_size": 3, "max_soft_tokens": 280},
        "video_processor": {"patch_size": 16, "pooling_kernel_size": 3},
    },
    "qwen3_vl": {
        "image_processor": {
            "patch_size": 16,
            "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        },
        "video_processor": {"patch_size": 16},
    },
    "mistral3": {
        "patch_size": 14,
        "image_processor": {"patch_size": 14, "size": {"longest_edge": 1540}},
    },
}


def save_published(name: str, folder: Path) -> None:
    """Write the folder of a model without its weights.

    Args:
        name: Name in `CONFIGS`.
        folder: Folder to write, which is created.
    """
    config = CONFIGS[name]
    kind = _SMALL.get(config["model_type"], config["model_type"])
    folder.mkdir(parents=True, exist_ok=True)
    token = save_folder(kind, folder)["image_token_id"]
    whole = {**config, "image_token_id": token, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(whole, indent=2))
    file = folder / "processor_config.json"
    file.write_text(json.dumps(_over(json.loads(file.read_text()), _PROCESSORS[kind]), indent=2))


def _over(below: Any, above: Any) -> Any:
    """A JSON value with the fields of another one in the place of its own."""
    if not isinstance(above, Mapping) or not isinstance(below, Mapping):
        return above
    return {**below, **{name: _over(below.get(name, {}), value) for name, value in above.items()}}


if __name__ == "__main__":
    save_published(sys.argv[1], Path(sys.argv[2]))
