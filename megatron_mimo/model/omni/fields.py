"""What becomes of every field of a model in a `nemotron_h_omni` folder of transformers.

A field is carried, or transformers' class computes with one value of it alone, or it changes
nothing that the class computes. A field that is in none of the tables is refused: whoever adds one
decides what becomes of it here.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_mimo.media.images import ImageConfig, ImageInput
from megatron_mimo.modules.gpt.config import GptConfig
from megatron_mimo.modules.hf.config import HfEncoderConfig, HfLanguageConfig
from megatron_mimo.modules.hybrid.config import HybridConfig
from megatron_mimo.modules.parakeet.config import ParakeetConfig, ParakeetModuleConfig
from megatron_mimo.modules.projector.config import ProjectorConfig
from megatron_mimo.modules.radio.config import (
    RadioConfig,
    RadioModuleConfig,
    VideoEmbeddingConfig,
)

OMNI = "transformers' NemotronH_Omni_Reasoning_V3"
_PROCESSOR = "its image processor"


@dataclass(frozen=True, slots=True)
class Carried:
    """A field that the folder has.

    Attributes:
        at: Where the folder has it.
    """

    at: str


@dataclass(frozen=True, slots=True)
class Fixed:
    """A field of which the class knows one value.

    Attributes:
        value: The value.
        needs: What the class would need to have others.
        flag: Flag that sets the field; "" for `--override` and `--model-config`.
    """

    value: Any
    needs: str
    flag: str = ""


@dataclass(frozen=True, slots=True)
class NoEffect:
    """A field that does not change what the class computes.

    Attributes:
        why: Reason.
    """

    why: str


type Fate = Carried | Fixed | NoEffect

_INITIAL = NoEffect("only initial weights depend on it")
_TRAINING = NoEffect("only training depends on it")
_TILES = NoEffect("only tiles depend on it")
_ONE_SIZE = NoEffect("only images of one size, and tiles, depend on it")


def _text(name: str) -> Carried:
    return Carried(f"`text_config.{name}`")


def _audio(name: str) -> Carried:
    return Carried(f"`audio_config.{name}`")


def _vision(name: str) -> Carried:
    return Carried(f"`vision_config.{name}`")


FATES: Mapping[type[Any], Mapping[str, Fate]] = {
    RadioConfig: {
        "num_layers": _vision("num_hidden_layers"),
        "hidden_size": Carried("`vision_config.hidden_size`, `vision_hidden_size`"),
        "num_attention_heads": _vision("num_attention_heads"),
        "ffn_hidden_size": _vision("mlp_ratio"),
        "activation": _vision("hidden_act"),
        "layernorm_epsilon": _vision("layer_norm_eps"),
        "final_layernorm": Carried(
            "`text_config.num_nextn_predict_layers`: with 1, the class has the norm"
        ),
        "layer_scale": Carried("weights; ones without it"),
        "patch_dim": Carried("`vision_config.patch_size`, and the processor"),
        "patch_bias": Fixed(False, "a bias in the embedding of patches"),
        "class_token_len": _vision("num_cls_tokens`, `num_registers"),
        "num_registers": _vision("num_registers"),
        "summary_tokens": _vision("summary_idxs"),
        "position_grid": _vision("max_img_size"),
        "position_crop": _TRAINING,
        "pixel_shuffle": Fixed(True, "a projector of single patches", "--pixel-shuffle"),
        "row_order": Fixed("nemotron", "a field for the order of merged patches"),
        "pixel_mean": Carried("the processor, `image_mean`"),
        "pixel_std": Carried("the processor, `image_std`"),
        "init_method_std": _INITIAL,
        "position_init_std": _INITIAL,
    },
    ProjectorConfig: {
        "kind": Fixed("mlp", "a projector of one layer"),
        "normalization": Fixed("RMSNorm", "a field for the projector's norm"),
        "activation": Fixed("squared_relu", "a field for the projector's activation"),
        "ffn_hidden_size": Carried("`projector_hidden_size`"),
        "bias": Fixed(False, "a bias in the projector's layers"),
        "layernorm_epsilon": Fixed(1e-5, "a field for the epsilon of the projector's norm"),
        "init_method_std": _INITIAL,
    },
    VideoEmbeddingConfig: {
        "frames": Carried("`video_temporal_patch_size`, and the processor"),
        "init_method_std": _INITIAL,
    },
    ParakeetConfig: {
        "num_layers": _audio("num_hidden_layers"),
        "hidden_size": _audio("hidden_size"),
        "num_attention_heads": _audio("num_attention_heads"),
        "ffn_hidden_size": _audio("intermediate_size"),
        "activation": _audio("hidden_act"),
        "attention_bias": _audio("attention_bias"),
        "convolution_bias": _audio("convolution_bias"),
        "conv_kernel_size": _audio("conv_kernel_size"),
        "subsampling_factor": _audio("subsampling_factor"),
        "subsampling_conv_channels": _audio("subsampling_conv_channels"),
        "num_mel_bins": _audio("num_mel_bins"),
        "scale_input": _audio("scale_input"),
        "batch_norm": _TRAINING,
        "init_method_std": _INITIAL,
        "convolution_init_std": _INITIAL,
    },
    HybridConfig: {
        "pattern": _text("layers_block_type"),
        "hidden_size": _text("hidden_size"),
        "num_attention_heads": _text("num_attention_heads"),
        "num_query_groups": _text("num_key_value_heads"),
        "kv_channels": _text("head_dim"),
        "ffn_hidden_size": _text("intermediate_size"),
        "mamba_num_heads": _text("mamba_num_heads"),
        "mamba_head_dim": _text("mamba_head_dim"),
        "mamba_num_groups": _text("n_groups"),
        "mamba_state_dim": _text("ssm_state_size"),
        "mamba_step_floor": _text("time_step_min"),
        "num_moe_experts": _text("n_routed_experts"),
        "moe_router_topk": _text("num_experts_per_tok`, `norm_topk_prob"),
        "moe_ffn_hidden_size": _text("moe_intermediate_size"),
        "moe_shared_expert_intermediate_size": _text("moe_shared_expert_intermediate_size"),
        "moe_router_topk_scaling_factor": _text("routed_scaling_factor"),
        "moe_aux_loss_coeff": _TRAINING,
        "moe_router_bias_update_rate": _TRAINING,
        "moe_router_force_load_balancing": Fixed(False, "a router that draws experts at random"),
        "layernorm_epsilon": _text("layer_norm_epsilon"),
        "init_method_std": _INITIAL,
        "share_embeddings_and_output_weights": Carried("weights: the table is written twice"),
    },
    ImageConfig: {
        "patch_dim": Carried("the processor, `patch_size`"),
        "pixel_shuffle": Fixed(True, "rows of single patches", "--pixel-shuffle"),
        "row_order": Fixed("nemotron", "a field for the order of merged patches"),
        "dynamic_resolution": Fixed(
            True, f"images and tiles of one size in {_PROCESSOR}", "--dynamic-resolution"
        ),
        "grid_rule": Fixed(
            "nemotron-omni",
            f"another rule of sizes in {_PROCESSOR}",
            "--dynamic-resolution-rule",
        ),
        "min_patches": Carried("the processor, `min_num_patches`"),
        "max_patches": Carried("the processor, `max_num_patches`, `max_model_len`"),
        "img_h": _ONE_SIZE,
        "img_w": _ONE_SIZE,
        "use_tiling": Fixed(False, f"tiles in {_PROCESSOR}", "--use-tiling"),
        "max_num_tiles": _TILES,
        "use_thumbnail": _TILES,
        "class_token_len": _vision("num_cls_tokens`, `num_registers"),
        "position_grid": _vision("max_img_size"),
        "position_crop": _TRAINING,
        "pixel_mean": Carried("the processor, `image_mean`"),
        "pixel_std": Carried("the processor, `image_std`"),
    },
    ImageInput: {
        "config": Carried("see the images"),
        "placeholder": Carried("`image_token_id`, and the tokenizer, `image_token`"),
        "tag_type": Carried("the tokenizer, `image_start_token`, `image_end_token`"),
        "mock_rows": NoEffect("only mock data depends on it"),
        "noun": NoEffect("a name in messages and stored samples"),
    },
}
"""Config -> its fields -> what becomes of them."""

FAMILIES: Mapping[type[Any], str | None] = {
    RadioModuleConfig: None,
    ParakeetModuleConfig: None,
    HybridConfig: None,
    GptConfig: "a dense decoder as its language model, which is a hybrid of Mamba-2 and attention",
    # Runs of these become folders of the model that they began from.
    HfEncoderConfig: "the encoder of another model",
    HfLanguageConfig: "the language model of another model",
}
"""Architecture of a module -> what the class would need to have it; None for those that it has."""


def require_carried(name: str, config: Any, more: Collection[str] = ()) -> None:
    """Refuse a config with a value that transformers' class does not have.

    Args:
        name: Name of the part in messages, such as "vision".
        config: One of the configs of `FATES`.
        more: Fields that this part carries, and others of its kind do not.

    Raises:
        ValueError: A field has such a value, or is in no table; the message names it.
    """
    for fault in _faults(name, config, more):
        raise ValueError(fault)


def _faults(name: str, config: Any, more: Collection[str]) -> Iterator[str]:
    for field in fields(config):
        if field.name in more:
            continue
        value, fate = getattr(config, field.name), FATES[type(config)].get(field.name)
        match fate:
            case Fixed(supported, needs, flag) if value != supported:
                where = f" ({flag})" if flag else ""
                yield (
                    f"{name}.{field.name}{where} is {value!r}: {OMNI} has {supported!r} only; it "
                    f"would need {needs}"
                )
            case None:
                yield (
                    f"{name}.{field.name} is {value!r}, and nothing says what {OMNI} makes of it: "
                    f"this model cannot be exported"
                )
