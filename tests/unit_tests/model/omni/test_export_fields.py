"""Every field of a model has a fate in an exported folder, and those that stand in the way do."""

from dataclasses import fields, replace
from typing import Any

import pytest

from megatron_mimo.config.presets import PROVIDERS, model_config
from megatron_mimo.media.images import ImageConfig
from megatron_mimo.model.config import ModelConfig, vision_language
from megatron_mimo.model.omni.config import (
    OmniConfig,
    require_exportable,
    write_omni,
)
from megatron_mimo.model.omni.fields import FAMILIES, FATES, Carried, Fixed, require_carried
from megatron_mimo.modules.families import _FAMILIES
from megatron_mimo.modules.gpt.config import GptConfig
from megatron_mimo.modules.hybrid.config import HybridConfig
from megatron_mimo.modules.parakeet.config import ParakeetConfig, ParakeetModuleConfig
from megatron_mimo.modules.projector.config import ProjectorConfig
from megatron_mimo.modules.radio.config import (
    RadioConfig,
    RadioModuleConfig,
    VideoEmbeddingConfig,
)

TINY = "nemotron-moe-vlm-tiny"
# Another value of each field that is fixed.
OTHERS: dict[tuple[type, str], Any] = {
    (RadioConfig, "patch_bias"): True,
    (RadioConfig, "pixel_shuffle"): False,
    (RadioConfig, "row_order"): "megatron",
    (ProjectorConfig, "kind"): "affine",
    (ProjectorConfig, "normalization"): "LayerNorm",
    (ProjectorConfig, "activation"): "gelu",
    (ProjectorConfig, "bias"): True,
    (ProjectorConfig, "layernorm_epsilon"): 1e-6,
    (HybridConfig, "moe_router_force_load_balancing"): True,
    (ImageConfig, "pixel_shuffle"): False,
    (ImageConfig, "row_order"): "megatron",
    (ImageConfig, "dynamic_resolution"): False,
    (ImageConfig, "grid_rule"): "nearest",
    (ImageConfig, "use_tiling"): True,
}
# Of each carried field of the model, another value, which changes config.json.
CHANGED: dict[str, Any] = {
    "vision.num_layers": 3, "vision.hidden_size": 64, "vision.num_attention_heads": 8,
    "vision.ffn_hidden_size": 100, "vision.activation": "gelu", "vision.layernorm_epsilon": 1e-3,
    "vision.final_layernorm": False, "vision.patch_dim": 4, "vision.class_token_len": 5,
    "vision.num_registers": 2, "vision.summary_tokens": (), "vision.position_grid": 8,
    "projector.ffn_hidden_size": 100,
    "language.pattern": "M*", "language.hidden_size": 64, "language.num_attention_heads": 8,
    "language.num_query_groups": 4, "language.kv_channels": 16, "language.ffn_hidden_size": 100,
    "language.mamba_num_heads": 4, "language.mamba_head_dim": 16, "language.mamba_num_groups": 1,
    "language.mamba_state_dim": 16, "language.mamba_step_floor": 0.1,
    "language.num_moe_experts": 4, "language.moe_router_topk": 1,
    "language.moe_ffn_hidden_size": 64,
    "language.moe_shared_expert_intermediate_size": 64,
    "language.moe_router_topk_scaling_factor": 1.5, "language.layernorm_epsilon": 1e-3,
    "language.share_embeddings_and_output_weights": True,
    "video.frames": 3,
    "audio.num_layers": 3, "audio.hidden_size": 32, "audio.num_attention_heads": 2,
    "audio.ffn_hidden_size": 100, "audio.activation": "gelu", "audio.attention_bias": True,
    "audio.convolution_bias": False, "audio.conv_kernel_size": 5, "audio.subsampling_factor": 4,
    "audio.subsampling_conv_channels": 4, "audio.num_mel_bins": 32, "audio.scale_input": True,
    "audio_projector.ffn_hidden_size": 100, "audio_projector.bias": True,
}  # fmt: skip
# Not in config.json: in the processor's file, or in the weights.
ELSEWHERE = {"vision.pixel_mean", "vision.pixel_std", "vision.layer_scale"}


@pytest.mark.parametrize("kind", FATES, ids=lambda kind: kind.__name__)
def test_every_field_has_a_fate(kind: type) -> None:
    assert {field.name for field in fields(kind)} == FATES[kind].keys()


def test_every_family_has_a_fate() -> None:
    # Other tests register families from outside.
    ours = {kind for kind in _FAMILIES if kind.__module__.startswith("megatron_mimo.")}
    assert FAMILIES.keys() == ours
    parts = {type(part) for build in PROVIDERS.values() for part in build().parts.values()}
    assert parts - {GptConfig} <= FATES.keys()
    names = {field.name for field in fields(RadioModuleConfig)}
    assert names == {"vision", "projector", "video", "images"}


def test_every_fixed_field_is_tried() -> None:
    fixed = {(k, n) for k, of in FATES.items() for n, fate in of.items() if isinstance(fate, Fixed)}
    assert fixed == OTHERS.keys()


@pytest.mark.parametrize(("kind", "name"), OTHERS, ids=str)
def test_a_field_in_the_way_is_named_with_its_value(kind: Any, name: str) -> None:
    changes = {name: OTHERS[kind, name]}
    fate = FATES[kind][name]
    assert isinstance(fate, Fixed)
    base = kind()
    if kind is ImageConfig:
        base = kind(grid_rule="nemotron-omni")
        changes |= {"dynamic_resolution": False} if name == "use_tiling" else {}
    require_carried("a", base)
    with pytest.raises(ValueError) as caught:
        # Tiles are refused for the first of two reasons.
        require_carried("a", replace(base, **changes))
    shown = str(caught.value)
    assert len(shown.splitlines()) == 1
    if name != "use_tiling":
        assert f"a.{name}" in shown and f"is {changes[name]!r}: transformers'" in shown
        assert f"has {fate.value!r} only; it would need {fate.needs}" in shown


def test_a_new_field_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: fate for name, fate in FATES[HybridConfig].items() if name != "pattern"}
    monkeypatch.setattr("megatron_mimo.model.omni.fields.FATES", {HybridConfig: known})
    with pytest.raises(ValueError, match="language.pattern is 'M-M.*nothing says what"):
        require_carried("language", HybridConfig())


def described(model: ModelConfig) -> dict[str, Any]:
    return write_omni(OmniConfig(model=model, vocab_size=384, seq_length=64, image_token_id=258))


def test_every_carried_field_changes_what_is_written() -> None:
    tiny = model_config(TINY)
    base = vision_language(
        vision=tiny.part("vision"),
        projector=tiny.part("projector"),
        language=tiny.part("language"),
        video=VideoEmbeddingConfig(),
        audio=ParakeetModuleConfig(audio=ParakeetConfig(num_layers=2, hidden_size=64)),
    )
    carried = {
        f"{part}.{name}"
        for part in ("vision", "projector", "language", "video", "audio", "audio_projector")
        for name, fate in FATES[type(base.part(part))].items()
        if isinstance(fate, Carried)
    }
    carried.add("audio_projector.bias")
    assert carried == CHANGED.keys() | ELSEWHERE
    for name, value in CHANGED.items():
        part, _, field = name.partition(".")
        changed = base.with_parts(**{part: replace(base.part(part), **{field: value})})
        assert described(changed) != described(base), name


def test_presets() -> None:
    for name in PROVIDERS:
        if name in ("mock", "omni-tiny"):
            with pytest.raises(ValueError, match="llm of the model is a GptConfig: .* would need"):
                require_exportable(model_config(name))
        else:
            require_exportable(model_config(name))


def test_widths_survive_the_ratio_that_carries_them() -> None:
    base = model_config(TINY)
    for width, wide in ((48, 49), (1152, 4304), (768, 3071), (147, 1000), (93, 77)):
        part = replace(
            base.part("vision"), hidden_size=width, num_attention_heads=1, ffn_hidden_size=wide
        )
        ratio = described(base.with_parts(vision=part))["vision_config"]["mlp_ratio"]
        assert int(width * ratio) == wide
