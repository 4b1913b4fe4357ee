"""Weights of the hybrid model as transformers' `NemotronHForCausalLM` stores them."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from megatron_mimo.modules.hybrid.config import HybridConfig
from megatron_mimo.weights.folder import WeightFolder
from megatron_mimo.weights.load import Place, as_stored, export_module, fill_module
from megatron_mimo.weights.names import table_name
from megatron_mimo.weights.table import Entry, interleaved_qkv

_LETTERS = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}
# Fields that the architecture here does not have, with the value that means absence.
_ABSENT: Mapping[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "conv_kernel": 4,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "n_group": 1,
    "topk_group": 1,
    "moe_latent_size": None,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 0,
    "residual_in_fp32": False,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
# Ours -> theirs, where the value is the same.
_FIELDS: Mapping[str, str] = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "n_groups",
    "mamba_state_dim": "ssm_state_size",
    "mamba_step_floor": "time_step_min",
    "num_moe_experts": "n_routed_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "layernorm_epsilon": "layer_norm_epsilon",
    "init_method_std": "initializer_range",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}
# Far below any step that float32 distinguishes from zero.
_NO_FLOOR = 1e-30
_EMBEDDING, _OUTPUT = "backbone.embeddings.weight", "lm_head.weight"
_TIED = "share_embeddings_and_output_weights"
# Tensors that a folder may hold beside those of `name_table`: of tied tables it has one or two.
OPTIONAL = frozenset({_OUTPUT})


def read_config(folder: WeightFolder) -> tuple[HybridConfig, int]:
    """The architecture that a folder holds, and the size of its vocabulary.

    Raises:
        ValueError: The folder holds another kind of model, or one with unsupported parts.
    """
    found, where = folder.config, folder.config_name
    if found.get("model_type") != "nemotron_h":
        raise ValueError(
            f"{where} describes a model of type {found.get('model_type')!r}: expected "
            f"'nemotron_h', transformers' NemotronHForCausalLM"
        )
    for field, value in _ABSENT.items():
        if found.get(field, value) != value:
            raise ValueError(f"{where}: {field} is {found[field]!r}, only {value!r} is supported")
    pattern = _pattern(found)
    missing = [theirs for theirs in _FIELDS.values() if theirs not in found]
    missing += [] if "vocab_size" in found else ["vocab_size"]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: transformers writes all of them")
    # megatron-core normalises the weights of several experts, and not that of one.
    several, normalised = found["num_experts_per_tok"] > 1, found.get("norm_topk_prob", True)
    if "E" in pattern and normalised != several:
        raise ValueError(
            f"{where}: norm_topk_prob is {normalised!r} with num_experts_per_tok "
            f"{found['num_experts_per_tok']}, only {several!r} is supported: megatron-core "
            f"normalises the weights of several experts, and not that of one"
        )
    fields = {ours: found[theirs] for ours, theirs in _FIELDS.items()}
    fields[_TIED] = found["tie_word_embeddings"] and _holds_one_table(folder)
    return HybridConfig(pattern=pattern, **fields), found["vocab_size"]


def write_config(config: HybridConfig, vocab_size: int) -> dict[str, Any]:
    """Contents of config.json for an architecture."""
    names = {letter: name for name, letter in _LETTERS.items()}
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": vocab_size,
        "layers_block_type": [names[letter] for letter in config.layers],
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "norm_topk_prob": config.moe_router_topk > 1,
        # transformers takes its logarithm.
        "time_step_min": config.mamba_step_floor or _NO_FLOOR,
    }


def name_table(config: HybridConfig) -> tuple[Entry, ...]:
    """Every weight of an architecture, with its names here and in transformers."""
    return tuple(_entries(config))


def load_weights(
    module: nn.Module,
    config: HybridConfig,
    folder: WeightFolder,
    *,
    tp: Place,
    expt_tp: Place,
    first_expert: int,
) -> None:
    """Fill this rank's shard of a stage from a folder.

    Args:
        module: Module to fill, a `HybridModel`.
        config: Architecture of the module.
        folder: Folder with the weights.
        tp: Position of this rank among those that share a dense weight.
        expt_tp: Position of this rank among those that share a weight of an expert.
        first_expert: Number of the first expert that this rank holds.

    Raises:
        ValueError: A weight is missing, unexpected or of another shape; the message lists them.
    """
    fill_module(
        module,
        name_table(config),
        folder,
        table_name=partial(table_name, module, first_expert=first_expert),
        tp=tp,
        expt_tp=expt_tp,
        optional=OPTIONAL,
    )


def export_weights(module: nn.Module, config: HybridConfig) -> dict[str, Tensor]:
    """The weights of a whole `HybridModel` by their names in transformers.

    Each keeps its dtype and has the shape [...] that transformers stores.
    """
    tensors = export_module(module, name_table(config), table_name=partial(table_name, module))
    if config.share_embeddings_and_output_weights:
        # transformers never ties this model, so it needs both.
        tensors[_OUTPUT] = tensors[_EMBEDDING].clone()
    return tensors


def restore_weights(
    module: nn.Module, config: HybridConfig, folder: WeightFolder
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a whole `HybridModel` by name, as stored in the folder that filled it.

    Shapes [...] and dtypes are those of the folder; weights that have not changed since are equal
    to the stored ones bit for bit (`as_stored`).
    """
    held = export_weights(module, config)
    yield from as_stored({name: held[name] for name in held.keys() & folder.names}, folder)


def _entries(config: HybridConfig) -> Iterator[Entry]:
    yield Entry("embedding.word_embeddings.weight", (_EMBEDDING,))
    for number, letter in enumerate(config.layers):
        ours, theirs = f"decoder.layers.{number}", f"backbone.layers.{number}"
        norms = {"M": "norm", "*": "input_layernorm"}
        yield Entry(
            f"{ours}.{norms.get(letter, 'pre_mlp_layernorm')}.weight", (f"{theirs}.norm.weight",)
        )
        yield from _LAYERS[letter](ours, f"{theirs}.mixer", config)
    yield Entry("decoder.final_norm.weight", ("backbone.norm_f.weight",))
    if not config.share_embeddings_and_output_weights:
        yield Entry("output_layer.weight", (_OUTPUT,))


def _same(ours: str, theirs: str, names: Mapping[str, str]) -> Iterator[Entry]:
    for here, there in names.items():
        yield Entry(f"{ours}.{here}", (f"{theirs}.{there}",))


def _mamba(ours: str, theirs: str, _config: HybridConfig) -> Iterator[Entry]:
    names = ("in_proj.weight", "out_proj.weight", "norm.weight", "dt_bias", "A_log", "D")
    yield from _same(f"{ours}.mixer", theirs, {name: name for name in names})
    conv = {"conv1d_weight": "conv1d.weight", "conv1d_bias": "conv1d.bias"}
    yield from _same(f"{ours}.mixer", theirs, conv)


def _attention(ours: str, theirs: str, config: HybridConfig) -> Iterator[Entry]:
    yield interleaved_qkv(
        f"{ours}.self_attention.linear_qkv.weight",
        tuple(f"{theirs}.{part}_proj.weight" for part in "qkv"),
        groups=config.num_query_groups,
        head_dim=config.kv_channels,
    )
    yield Entry(f"{ours}.self_attention.linear_proj.weight", (f"{theirs}.o_proj.weight",))


_MLP = {"linear_fc1.weight": "up_proj.weight", "linear_fc2.weight": "down_proj.weight"}


def _mlp(ours: str, theirs: str, _config: HybridConfig) -> Iterator[Entry]:
    yield from _same(f"{ours}.mlp", theirs, _MLP)


def _experts(ours: str, theirs: str, config: HybridConfig) -> Iterator[Entry]:
    router = {"weight": "weight", "expert_bias": "e_score_correction_bias"}
    yield from _same(f"{ours}.mlp.router", f"{theirs}.gate", router)
    yield from _same(f"{ours}.mlp.shared_experts", f"{theirs}.shared_experts", _MLP)
    for expert in range(config.num_moe_experts):
        here = f"{ours}.mlp.experts.local_experts.{expert}"
        yield from _same(here, f"{theirs}.experts.{expert}", _MLP)


_LAYERS = {"M": _mamba, "*": _attention, "-": _mlp, "E": _experts}


def _holds_one_table(folder: WeightFolder) -> bool:
    """Whether embeddings and output layer share one weight; transformers always stores two."""
    if _OUTPUT not in folder.names:
        return True
    return folder.tensor(_OUTPUT).equal(folder.tensor(_EMBEDDING))


def _pattern(found: Mapping[str, Any]) -> str:
    if "hybrid_override_pattern" in found:
        return str(found["hybrid_override_pattern"])
    kinds = found.get("layers_block_type") or ()
    # Names before transformers 5.
    letters = _LETTERS | {"mamba": "M", "attention": "*"}
    unknown = sorted(set(kinds) - set(letters))
    if unknown:
        raise ValueError(
            f"layers_block_type has {', '.join(unknown)}: expected {', '.join(_LETTERS)}"
        )
    return "".join(letters[kind] for kind in kinds)
