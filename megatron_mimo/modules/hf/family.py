"""The families of vision-language models of transformers that train here: one record each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

PLAN_HELP = "set the tensor-parallel size to 1, or add the weight to the family's record"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the program has to know of a family beyond what transformers says itself.

    Names of modules are paths in the model, as in its `state_dict`.

    Attributes:
        model_type: Value of `model_type` in config.json.
        model_class: Name of the class in transformers.
        tower: Path of the vision encoder.
        projector: Paths of what maps the encoder's output to the width of the language model.
        image_token: Field of config.json with the number of the token that a row replaces.
        facts: Names of the integers of images that the language model's forward takes, such as
            "image_grid_thw".
        has_token_types: Whether forward takes the kind of each token, `mm_token_type_ids`.
        position_parts: Number of positions that each token has in a packed sequence; 1 where
            positions are those in the document alone.
        deepstack: Name of the field of `vision_config` that lists the layers whose features enter
            the first layers of the language model as well; "" without any.
        image_blocks: Whether tokens of an image can see later ones of it in layers with a window;
            `use_bidirectional_attention` of a model says so.
        plan: Styles of tensor parallelism that transformers' plans leave out, by path, with `*` for
            the number of a layer.
        tower_plan: The same of the encoder.
        tower_heads: Path of the encoder's attention layers whose `num_heads` is the number of heads
            that a rank computes; "" where they read it from the shape.
        refused: Field of `text_config` -> reason for which a value other than 0, False or None of
            it cannot be divided into pipeline stages.
    """

    model_type: str
    model_class: str
    tower: str = "model.vision_tower"
    projector: tuple[str, ...] = ("model.multi_modal_projector",)
    image_token: str = "image_token_id"
    facts: tuple[str, ...] = ()
    has_token_types: bool = False
    position_parts: int = 1
    deepstack: str = ""
    image_blocks: bool = False
    plan: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    tower_plan: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    tower_heads: str = ""
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def row_parts(self, description: Mapping[str, Any]) -> int:
        """Number of vectors of the language model's width that a row consists of."""
        if not self.deepstack:
            return 1
        return 1 + len(description["vision_config"].get(self.deepstack) or ())


LAYERS = "model.language_model.layers.*"
_NORMS: Mapping[str, str] = {
    f"{LAYERS}.self_attn.q_norm": "replicated_with_grad_allreduce",
    f"{LAYERS}.self_attn.k_norm": "replicated_with_grad_allreduce",
}
_DENSE: Mapping[str, str] = {
    **{f"{LAYERS}.self_attn.{name}_proj": "colwise" for name in "qkv"},
    f"{LAYERS}.self_attn.o_proj": "rowwise",
    f"{LAYERS}.mlp.gate_proj": "colwise",
    f"{LAYERS}.mlp.up_proj": "colwise",
    f"{LAYERS}.mlp.down_proj": "rowwise",
}
_QWEN_BLOCKS = "model.visual.blocks.*"
_QWEN: Mapping[str, Any] = {
    "tower": "model.visual",
    "facts": ("image_grid_thw",),
    "has_token_types": True,
    "position_parts": 4,
    "tower_heads": f"{_QWEN_BLOCKS}.attn",
    "tower_plan": {
        f"{_QWEN_BLOCKS}.attn.qkv": "fused_qkv_colwise",
        f"{_QWEN_BLOCKS}.attn.proj": "rowwise",
        f"{_QWEN_BLOCKS}.mlp.linear_fc1": "colwise",
        f"{_QWEN_BLOCKS}.mlp.linear_fc2": "rowwise",
    },
}
_PIXTRAL = "model.vision_tower.transformer.layers.*"
_SIGLIP = "model.vision_tower.encoder.layers.*"
_SHARED = "layers use what other layers have computed"

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="gemma4",
            model_class="Gemma4ForConditionalGeneration",
            projector=("model.embed_vision",),
            has_token_types=True,
            image_blocks=True,
            refused={
                "hidden_size_per_layer_input": "every layer reads embeddings of its own",
                "num_kv_shared_layers": _SHARED,
            },
        ),
        Family(
            model_type="mistral3",
            model_class="Mistral3ForConditionalGeneration",
            tower_heads=f"{_PIXTRAL}.attention",
            tower_plan={
                **{f"{_PIXTRAL}.attention.{name}_proj": "colwise" for name in "qkv"},
                f"{_PIXTRAL}.attention.o_proj": "rowwise",
                f"{_PIXTRAL}.feed_forward.gate_proj": "colwise",
                f"{_PIXTRAL}.feed_forward.up_proj": "colwise",
                f"{_PIXTRAL}.feed_forward.down_proj": "rowwise",
            },
        ),
        Family(
            model_type="qwen3_5",
            model_class="Qwen3_5ForConditionalGeneration",
            projector=("model.visual.merger",),
            **_QWEN,
        ),
        Family(
            model_type="qwen3_5_moe",
            model_class="Qwen3_5MoeForConditionalGeneration",
            projector=("model.visual.merger",),
            **_QWEN,
        ),
        Family(
            model_type="qwen3_vl",
            model_class="Qwen3VLForConditionalGeneration",
            projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
            deepstack="deepstack_visual_indexes",
            plan={**_DENSE, **_NORMS},
            **_QWEN,
        ),
        Family(
            model_type="qwen3_vl_moe",
            model_class="Qwen3VLMoeForConditionalGeneration",
            projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
            deepstack="deepstack_visual_indexes",
            plan=_NORMS,
            **_QWEN,
        ),
        Family(
            model_type="llava_onevision",
            model_class="LlavaOnevisionForConditionalGeneration",
            projector=("model.multi_modal_projector", "model.image_newline"),
            tower_plan={
                **{f"{_SIGLIP}.self_attn.{name}_proj": "colwise" for name in "qkv"},
                f"{_SIGLIP}.self_attn.out_proj": "rowwise",
                f"{_SIGLIP}.mlp.fc1": "colwise",
                f"{_SIGLIP}.mlp.fc2": "rowwise",
            },
        ),
    )
}


def family_of(model_type: object, where: str = "config.json") -> Family:
    """The record of a family.

    Raises:
        ValueError: The type is not supported; the message names those that are.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{where} describes a model of type {model_type!r}: expected one of "
            f"{', '.join(FAMILIES)} or nemotron_h_omni"
        )
    return FAMILIES[model_type]
