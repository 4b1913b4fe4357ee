"""A tiny random model of each family, and images as its encoder takes them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VOCAB, IMAGE = 256, 250
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}
_QWEN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
}


def gemma4(*, moe: bool = False, sound: bool = False, layers: int = 6, **changes: Any) -> Any:
    """Sliding and full attention, images that see themselves both ways, capped logits, tied."""
    from transformers import (
        Gemma4AudioConfig,
        Gemma4Config,
        Gemma4TextConfig,
        Gemma4VisionConfig,
    )

    text = _TEXT | {
        "vocab_size_per_layer_input": VOCAB,
        "num_hidden_layers": layers,
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
        "sliding_window": 8,
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * (layers // 3),
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": True,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": "vision",
    }
    if moe:
        text |= {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        }
    vision = Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        patch_size=4,
        pooling_kernel_size=2,
        position_embedding_size=64,
        standardize=True,
    )
    return Gemma4Config(
        text_config=Gemma4TextConfig(**(text | changes)),
        vision_config=vision,
        audio_config=Gemma4AudioConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, output_proj_dims=32
        )
        if sound
        else None,
        image_token_id=IMAGE,
        video_token_id=251,
        audio_token_id=252,
        boi_token_id=253,
        eoi_token_id=254,
    )


def qwen3_vl(*, moe: bool = False, layers: int = 6, **changes: Any) -> Any:
    """Features of images in the first layers too, positions in time, row and column, tied."""
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    }
    text = _TEXT | {"num_hidden_layers": layers, "rope_parameters": rope}
    text |= _EXPERTS | {"decoder_sparse_step": 1} if moe else {}
    vision = _QWEN_VISION | {"depth": 4, "deepstack_visual_indexes": [0, 1, 2]}
    kind = Qwen3VLMoeConfig if moe else Qwen3VLConfig
    return kind(
        text_config=text | changes,
        vision_config=vision,
        tie_word_embeddings=True,
        **_QWEN_IDS,
    )


def qwen3_5(*, moe: bool = False, layers: int = 4, **changes: Any) -> Any:
    """Linear attention in three of four layers."""
    from transformers import Qwen3_5Config, Qwen3_5MoeConfig

    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    }
    text = _TEXT | {
        "num_hidden_layers": layers,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "rope_parameters": rope,
    }
    text |= _EXPERTS | {"shared_expert_intermediate_size": 32} if moe else {}
    kind = Qwen3_5MoeConfig if moe else Qwen3_5Config
    vision = _QWEN_VISION | {"depth": 2}
    return kind(text_config=text | changes, vision_config=vision, **_QWEN_IDS)


def mistral3(*, layers: int = 4, **changes: Any) -> Any:
    """Pixtral's encoder, and a head of its own."""
    from transformers import Mistral3Config

    text = _TEXT | {"model_type": "mistral", "num_hidden_layers": layers}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "image_size": 64,
        "num_channels": 3,
    }
    return Mistral3Config(
        text_config=text | changes,
        vision_config=vision,
        image_token_id=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def llava_onevision(*, layers: int = 4, **changes: Any) -> Any:
    """Tiles of one size, and an embedding after each row."""
    from transformers import LlavaOnevisionConfig

    text = _TEXT | {"model_type": "qwen2", "num_hidden_layers": layers}
    del text["head_dim"]
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 8,
        "vision_use_head": False,
    }
    return LlavaOnevisionConfig(
        text_config=text | changes,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=251,
        image_grid_pinpoints=[[8, 8], [8, 16], [16, 8], [16, 16]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


CONFIGS: dict[str, Callable[..., Any]] = {
    "gemma4": gemma4,
    "gemma4 moe": lambda **changes: gemma4(moe=True, **changes),
    "gemma4 e-series": lambda **changes: gemma4(
        **{"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2} | changes
    ),
    "mistral3": mistral3,
    "qwen3_5": qwen3_5,
    "qwen3_5 moe": lambda **changes: qwen3_5(moe=True, **changes),
    "qwen3_vl": qwen3_vl,
    "qwen3_vl moe": lambda **changes: qwen3_vl(moe=True, **changes),
    "llava_onevision": llava_onevision,
}
# Norms of Gemma whose results are added to the hidden states.
_ADDED = tuple(
    f"post_{part}.weight"
    for part in ("attention_layernorm", "feedforward_layernorm", "per_layer_input_norm")
)
SIZES = ((4, 4), (4, 6), (2, 4), (6, 6))
"""Rows and columns of patches of the images."""


def build(name: str, **changes: Any) -> Any:
    """A model with random weights, always the same, in training mode."""
    import torch
    import transformers

    from megatron_mimo.modules.hf.family import family_of

    config = CONFIGS[name](**changes)
    kind = getattr(transformers, family_of(config.model_type).model_class)
    torch.manual_seed(0)
    model = kind(config)
    for path, weight in model.named_parameters():
        # As large as those of a trained model: with ones attention looks at one token alone, and
        # training is chaotic.
        if path.endswith(("q_norm.weight", "k_norm.weight")):
            weight.data.mul_(0.3)
        # A layer of Gemma adds what its last norm gives. With ones that is six times an embedding,
        # the sequence is forgotten in the first layer, and a change of all weights by 1e-7 changes
        # the norm of a gradient by 2e-4 within 50 steps in float64; so it is by 1e-6.
        if name.startswith("gemma4"):
            if path.endswith(_ADDED):
                weight.data.mul_(0.3)
            if path.endswith("embed_tokens.weight"):
                weight.data.mul_(3)
        # Of the size of embeddings, so that images count.
        if path.endswith("image_newline"):
            weight.data.normal_(std=0.1)
    for path, buffer in model.named_buffers():
        if path.endswith(("std_bias", "std_scale")):
            buffer.normal_(mean=float(path.endswith("std_scale")), std=0.1)
    return model.train()


def image(name: str, number: int) -> "tuple[dict[str, Tensor], int, dict[str, list[int]]]":
    """An image as its encoder takes it, its number of rows, and its facts."""
    import torch

    random = torch.Generator().manual_seed(100 + number)
    height, width = SIZES[number % len(SIZES)]
    if name.startswith("gemma4"):
        most = max(rows * columns for rows, columns in SIZES)
        places = torch.full((1, most, 2), -1)
        grid = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
        places[0, : height * width] = torch.stack(grid, -1).reshape(-1, 2)
        pixels = torch.rand(1, most, 48, generator=random)
        return {"pixel_values": pixels, "image_position_ids": places}, height * width // 4, {}
    if name.startswith("qwen"):
        pixels = torch.rand(height * width, 96, generator=random)
        grid_thw = [1, height, width]
        arguments = {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid_thw])}
        return arguments, height * width // 4, {"image_grid_thw": grid_thw}
    if name == "mistral3":
        pixels = torch.zeros(1, 3, 24, 24)
        pixels[:, :, : 4 * height, : 4 * width] = torch.rand(
            1, 3, 4 * height, 4 * width, generator=random
        )
        sizes = torch.tensor([[4 * height, 4 * width]])
        return {"pixel_values": pixels, "image_sizes": sizes}, height * width // 4, {}
    # One tile is the whole image, four are its parts: a row of 4 x 4 features has its end.
    pixels = torch.rand(1, 5, 3, 8, 8, generator=random)
    sizes = torch.tensor([[16, 16]])
    return {"pixel_values": pixels, "image_sizes": sizes}, 4 + 4 * (4 + 1), {}


def joined(images: "list[dict[str, Tensor]]") -> "dict[str, Tensor]":
    """Several images in one call of the encoder."""
    import torch

    return {name: torch.cat([one[name] for one in images]) for name in images[0]}
