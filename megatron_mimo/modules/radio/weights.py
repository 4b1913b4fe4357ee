"""RADIO weights as transformers' `RadioModel` stores them: tables of names, import and export."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mimo.modules.radio.config import RadioConfig
from megatron_mimo.weights.folder import WeightFolder
from megatron_mimo.weights.load import as_stored, export_module, fill_module
from megatron_mimo.weights.names import table_name
from megatron_mimo.weights.table import Entry, interleaved_qkv


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """Names of the parts of RADIO in a checkpoint.

    Attributes:
        root: Beginning of the buffers' names.
        patches: Name of the embedding of patches.
        position: Name of the table of position embeddings, [1, cells, H].
        class_token: Name of the class tokens and registers.
        layers: Beginning of a layer's name, before its number.
        qkv: Names within a layer of query, key and value, or of all three in one.
        proj: Name within a layer of the projection after attention.
        final_norm: Name of the norm after the last layer; transformers' `RadioModel` has none.
    """

    root: str
    patches: str
    position: str
    class_token: str
    layers: str
    qkv: tuple[str, ...]
    proj: str
    final_norm: str

    @property
    def mean(self) -> str:
        """Name of the buffer with the channels' mean."""
        return f"{self.root}input_conditioner.norm_mean"

    @property
    def std(self) -> str:
        """Name of the buffer with the channels' standard deviation."""
        return f"{self.root}input_conditioner.norm_std"

    @property
    def summary(self) -> str:
        """Name of the buffer with the class tokens of `RadioModel`'s summary; nothing reads it."""
        return f"{self.root}summary_idxs"


# As published, and as transformers writes.
PUBLISHED = Names(
    root="radio_model.",
    patches="radio_model.model.patch_generator.embedder",
    position="radio_model.model.patch_generator.pos_embed",
    class_token="radio_model.model.patch_generator.cls_token.token",
    layers="radio_model.model.blocks",
    qkv=("attn.qkv",),
    proj="attn.proj",
    final_norm="radio_model.model.norm",
)
# As the modules of transformers' `RadioModel` are called.
MODULES = Names(
    root="",
    patches="embeddings.patch_projection",
    position="embeddings.position_embedding",
    class_token="embeddings.cls_register_token",
    layers="encoder.layer",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    proj="attention.o_proj",
    final_norm="final_layernorm",
)
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "fast_gelu", "gelu_new": "fast_gelu"}
# Fields that the architecture here does not have, with the value that means absence.
_ABSENT: Mapping[str, Any] = {
    "use_swiglu_ffn": False,
    "qkv_bias": True,
    "num_channels": 3,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
}


def names_of(folder: WeightFolder) -> Names:
    """The names that a folder uses for its weights."""
    return PUBLISHED if PUBLISHED.position in folder.names else MODULES


def read_config(folder: WeightFolder) -> RadioConfig:
    """The architecture that a folder holds.

    The weights say whether there is a final norm, and how pixels are normalised.

    Raises:
        ValueError: The folder holds another kind of model, or one with unsupported parts.
    """
    found = folder.config
    where = folder.config_name
    if found.get("model_type") != "radio":
        raise ValueError(
            f"{where} describes a model of type {found.get('model_type')!r}: expected 'radio', "
            f"transformers' RadioModel"
        )
    for field, value in _ABSENT.items():
        if found.get(field, value) != value:
            raise ValueError(f"{where}: {field} is {found[field]!r}, only {value!r} is supported")
    activation = found.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{where}: hidden_act is {activation!r}: expected one of {', '.join(_ACTIVATIONS)}"
        )
    names = names_of(folder)
    width, patch_dim = found.get("hidden_size", 1280), found.get("patch_size", 16)
    registers = found.get("num_registers", 7)
    defaults = RadioConfig()
    return RadioConfig(
        num_layers=found.get("num_hidden_layers", 32),
        hidden_size=width,
        num_attention_heads=found.get("num_attention_heads", 16),
        ffn_hidden_size=int(width * found.get("mlp_ratio", 4.0)),
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
        layernorm_epsilon=found.get("layer_norm_eps", 1e-6),
        final_layernorm=f"{names.final_norm}.weight" in folder.names,
        patch_dim=patch_dim,
        class_token_len=found.get("num_cls_tokens", 3) + registers,
        num_registers=registers,
        summary_tokens=_summary_tokens(folder, names),
        position_grid=found.get("max_img_size", 2048) // patch_dim,
        pixel_mean=_triple(folder, names.mean, found.get("norm_mean", defaults.pixel_mean)),
        pixel_std=_triple(folder, names.std, found.get("norm_std", defaults.pixel_std)),
    )


def has_layer_scales(folder: WeightFolder) -> bool:
    """Whether a folder stores scales after attention and MLP."""
    return f"{names_of(folder).layers}.0.layer_scale1.lambda1" in folder.names


def write_config(config: RadioConfig) -> dict[str, Any]:
    """Contents of config.json for an architecture."""
    names = {"gelu": "gelu", "fast_gelu": "gelu_pytorch_tanh"}
    return {
        "architectures": ["RadioModel"],
        "model_type": "radio",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "mlp_ratio": _ratio(config.ffn_hidden_size, config.hidden_size),
        "hidden_act": names[config.activation],
        "layer_norm_eps": config.layernorm_epsilon,
        "patch_size": config.patch_dim,
        "max_img_size": config.position_grid * config.patch_dim,
        "num_cls_tokens": config.class_token_len - config.num_registers,
        "num_registers": config.num_registers,
        "summary_idxs": _summarised(config),
        "norm_mean": list(config.pixel_mean),
        "norm_std": list(config.pixel_std),
    }


def _ratio(wide: int, width: int) -> float:
    """Factor with which `int(width * factor)` is the wide one."""
    ratio = wide / width
    return ratio if int(width * ratio) == wide else math.nextafter(ratio, math.inf)


def _summarised(config: RadioConfig) -> list[int]:
    """Class tokens of the summary, of those that there are."""
    classes = config.class_token_len - config.num_registers
    return [token for token in config.summary_tokens if token < classes]


def name_table(config: RadioConfig, names: "Names") -> tuple[Entry, ...]:
    """Every weight of an architecture, with its names here and in a checkpoint."""
    return tuple(_entries(config, names))


def _entries(config: RadioConfig, names: "Names") -> Iterator[Entry]:
    yield Entry("embedding.projection.weight", (f"{names.patches}.weight",))
    if config.patch_bias:
        yield Entry("embedding.projection.bias", (f"{names.patches}.bias",))
    yield Entry(
        "embedding.position",
        (names.position,),
        join=lambda tensors: tensors[0][0],
        split=lambda tensor: (tensor[None],),
    )
    yield Entry("embedding.class_token", (names.class_token,))
    heads = config.num_attention_heads
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"{names.layers}.{layer}"
        for kind in ("weight", "bias"):
            yield interleaved_qkv(
                f"{ours}.self_attention.linear_qkv.{kind}",
                tuple(f"{theirs}.{part}.{kind}" for part in names.qkv),
                groups=heads,
                head_dim=config.hidden_size // heads,
            )
            for here, there in (
                ("input_layernorm", "norm1"),
                ("self_attention.linear_proj", names.proj),
                ("pre_mlp_layernorm", "norm2"),
                ("mlp.linear_fc1", "mlp.fc1"),
                ("mlp.linear_fc2", "mlp.fc2"),
            ):
                yield Entry(f"{ours}.{here}.{kind}", (f"{theirs}.{there}.{kind}",))
        if config.layer_scale:
            yield Entry(f"{ours}.self_attn_bda.scale", (f"{theirs}.layer_scale1.lambda1",))
            yield Entry(f"{ours}.mlp_bda.scale", (f"{theirs}.layer_scale2.lambda1",))
    if config.final_layernorm:
        for kind in ("weight", "bias"):
            yield Entry(f"decoder.final_layernorm.{kind}", (f"{names.final_norm}.{kind}",))


def load_weights(
    module: nn.Module, config: RadioConfig, folder: WeightFolder, *, tp_rank: int, tp_size: int
) -> None:
    """Fill this rank's shard of a `RadioVit` stage from a folder.

    Raises:
        ValueError: A weight is missing, unexpected or of another shape; the message lists them.
    """
    names = names_of(folder)
    scales = layer_scales(config, names)
    fill_module(
        module,
        name_table(config, names),
        folder,
        table_name=partial(table_name, module),
        tp=(tp_rank, tp_size),
        expt_tp=(0, 1),
        change=lambda name, tensor: _scaled(folder, name, tensor, scales),
        optional=optional_names(config, names),
    )


def optional_names(config: RadioConfig, names: Names) -> frozenset[str]:
    """Names of tensors that a folder may hold beside those of `name_table`."""
    scales = layer_scales(config, names).values()
    return frozenset({names.mean, names.std, names.summary, *scales})


def export_weights(module: nn.Module, config: RadioConfig) -> dict[str, Tensor]:
    """The weights of a whole `RadioVit` by their names in transformers, buffers included.

    Each keeps its dtype and has the shape [...] that transformers stores.
    """
    names = PUBLISHED
    tensors = export_module(
        module, name_table(config, names), table_name=partial(table_name, module)
    )
    dtype = tensors[names.position].dtype
    for scale in layer_scales(config, names).values():
        tensors[scale] = torch.ones(config.hidden_size, dtype=dtype)
    tensors[names.mean] = torch.tensor(config.pixel_mean).view(-1, 1, 1)
    tensors[names.std] = torch.tensor(config.pixel_std).view(-1, 1, 1)
    tensors[names.summary] = torch.tensor(_summarised(config), dtype=torch.int64)
    return tensors


def restore_weights(
    module: nn.Module, config: RadioConfig, folder: WeightFolder
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a whole `RadioVit` by their names in the folder that it was filled from.

    Shapes [...] and dtypes are those of the folder. Weights that have not changed since are equal
    to the stored ones bit for bit (`as_stored`), as are scales after linear layers. A linear layer
    that has changed contains its scale, and the exported scale is one.
    """
    names = names_of(folder)
    tensors = export_module(
        module, name_table(config, names), table_name=partial(table_name, module)
    )
    yield from as_stored(_unscaled(tensors, layer_scales(config, names), folder), folder)
    for name in (names.mean, names.std, names.summary):
        if name in folder.names:
            yield name, folder.tensor(name)


def _unscaled(
    tensors: Mapping[str, Tensor], scales: Mapping[str, str], folder: WeightFolder
) -> dict[str, Tensor]:
    """Exported weights, and the folder's scales, removed again from unchanged layers."""
    unscaled = dict(tensors)
    for scale in sorted(folder.names & set(scales.values())):
        scaled = [name for name in scales if scales[name] == scale]
        stored = {name: folder.tensor(name) for name in (*scaled, scale)}
        if all(
            _scaled(folder, name, stored[name], scales)
            .to(tensors[name].dtype)
            .equal(tensors[name].cpu())
            for name in scaled
        ):
            unscaled |= stored
        else:
            unscaled[scale] = torch.ones_like(stored[scale])
    return unscaled


def layer_scales(config: RadioConfig, names: Names) -> dict[str, str]:
    """Weight -> the scale of its output that `RadioModel` has and the module here lacks."""
    scales: dict[str, str] = {}
    if config.layer_scale:
        return scales
    for layer in range(config.num_layers):
        prefix = f"{names.layers}.{layer}"
        for number, linear in ((1, names.proj), (2, "mlp.fc2")):
            for kind in ("weight", "bias"):
                scales[f"{prefix}.{linear}.{kind}"] = f"{prefix}.layer_scale{number}.lambda1"
    return scales


def _scaled(folder: WeightFolder, name: str, tensor: Tensor, scales: Mapping[str, str]) -> Tensor:
    """The part of a tensor that was read, with the scale after it multiplied in."""
    if name in scales and scales[name] in folder.names:
        scale = folder.tensor(scales[name])
        # Of the outputs, which are not sharded where there is a scale.
        tensor = tensor * scale.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.dtype)
    return tensor


def _summary_tokens(folder: WeightFolder, names: Names) -> tuple[int, ...]:
    if names.summary in folder.names:
        return tuple(folder.tensor(names.summary).tolist())
    return tuple(folder.config.get("summary_idxs") or RadioConfig().summary_tokens)


def _triple(
    folder: WeightFolder, name: str, configured: Sequence[float]
) -> tuple[float, float, float]:
    """A buffer of three numbers; from config.json where the weights are equal in float32."""
    red, green, blue = configured
    if name in folder.names:
        stored = folder.tensor(name).flatten()
        if not stored.equal(torch.tensor(configured).to(stored)):
            red, green, blue = stored.tolist()
    return red, green, blue
