"""Weights as transformers' `ParakeetEncoder` stores them: a table of names, import and export."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from megatron_mimo.modules.parakeet.config import ParakeetConfig
from megatron_mimo.weights.folder import WeightFolder
from megatron_mimo.weights.load import as_stored, export_module, fill_module
from megatron_mimo.weights.table import Entry, interleaved_qkv

OMNI_DEFAULTS: Mapping[str, Any] = {"attention_bias": False, "scale_input": False}
"""Values of fields that the audio section of a Nemotron Omni folder may leave out."""
# Released folders write the second.
_TYPES = ("parakeet_encoder", "parakeet")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}
# Fields here -> in transformers, with its default.
_FIELDS: Mapping[str, tuple[str, Any]] = {
    "num_layers": ("num_hidden_layers", 24),
    "hidden_size": ("hidden_size", 1024),
    "num_attention_heads": ("num_attention_heads", 8),
    "ffn_hidden_size": ("intermediate_size", 4096),
    "attention_bias": ("attention_bias", True),
    "convolution_bias": ("convolution_bias", True),
    "conv_kernel_size": ("conv_kernel_size", 9),
    "subsampling_factor": ("subsampling_factor", 8),
    "subsampling_conv_channels": ("subsampling_conv_channels", 256),
    "num_mel_bins": ("num_mel_bins", 80),
    "scale_input": ("scale_input", True),
    "init_method_std": ("initializer_range", 0.02),
}
# Fields that the architecture here does not have, with the value that means absence.
_ABSENT: Mapping[str, Any] = {"subsampling_conv_kernel_size": 3, "subsampling_conv_stride": 2}
_DROPOUTS = (
    "dropout",
    "dropout_positions",
    "layerdrop",
    "activation_dropout",
    "attention_dropout",
)
# Filters that released folders hold beside the weights; transformers drops them.
_EXTRACTOR = "feature_extractor."


def read_config(
    section: Mapping[str, Any], where: str, *, defaults: Mapping[str, Any] | None = None
) -> ParakeetConfig:
    """The architecture that a section of config.json describes, as transformers reads it.

    Probabilities of dropout and of leaving out layers are not read: there are none here.

    Args:
        section: Fields of transformers' `ParakeetEncoderConfig`.
        where: Name of the section, for messages.
        defaults: Values of fields that the section leaves out, where they differ from that class.

    Raises:
        ValueError: It describes another kind of encoder, or one with unsupported parts.
    """
    section = {**(defaults or {}), **section}
    kind = section.get("model_type", _TYPES[0])
    if kind not in _TYPES:
        raise ValueError(
            f"{where} describes a model of type {kind!r}: expected {_TYPES[0]!r}, transformers' "
            f"ParakeetEncoder"
        )
    for field, value in _ABSENT.items():
        if section.get(field, value) != value:
            raise ValueError(f"{where}: {field} is {section[field]!r}, only {value!r} is supported")
    activation = section.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{where}: hidden_act is {activation!r}: expected one of {', '.join(_ACTIVATIONS)}"
        )
    fields = {ours: section.get(*theirs) for ours, theirs in _FIELDS.items()}
    try:
        return ParakeetConfig(
            activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
            **fields,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def write_config(config: ParakeetConfig) -> dict[str, Any]:
    """Contents of config.json for an architecture."""
    return {
        "architectures": ["ParakeetEncoder"],
        "model_type": _TYPES[0],
        "hidden_act": config.activation,
        **{theirs: getattr(config, ours) for ours, (theirs, _) in _FIELDS.items()},
        **dict.fromkeys(_DROPOUTS, 0.0),
        **_ABSENT,
    }


def name_table(config: ParakeetConfig) -> tuple[Entry, ...]:
    """Every weight and buffer of an architecture, with its names here and in transformers."""
    return tuple(_entries(config))


def _entries(config: ParakeetConfig) -> Iterator[Entry]:
    yield from _subsampling(config)
    heads = config.num_attention_heads
    attention = ("weight", "bias") if config.attention_bias else ("weight",)
    for layer in range(config.num_layers):
        name = f"layers.{layer}"
        for here, there in (
            ("norm_feed_forward1", "norm_feed_forward1"),
            ("norm_self_attention", "norm_self_att"),
            ("norm_convolution", "norm_conv"),
            ("norm_feed_forward2", "norm_feed_forward2"),
            ("norm_out", "norm_out"),
        ):
            for kind in ("weight", "bias"):
                yield Entry(f"{name}.{here}.{kind}", (f"{name}.{there}.{kind}",))
        for kind in attention:
            for mlp in ("feed_forward1", "feed_forward2"):
                for number in (1, 2):
                    yield Entry(
                        f"{name}.{mlp}.linear_fc{number}.{kind}",
                        (f"{name}.{mlp}.linear{number}.{kind}",),
                    )
            yield interleaved_qkv(
                f"{name}.self_attention.linear_qkv.{kind}",
                tuple(f"{name}.self_attn.{part}_proj.{kind}" for part in "qkv"),
                groups=heads,
                head_dim=config.hidden_size // heads,
            )
            yield Entry(
                f"{name}.self_attention.linear_proj.{kind}", (f"{name}.self_attn.o_proj.{kind}",)
            )
        for part in ("relative_k_proj.weight", "bias_u", "bias_v"):
            yield Entry(f"{name}.self_attention.{part}", (f"{name}.self_attn.{part}",))
        yield from _convolution(f"{name}.convolution", f"{name}.conv", config)


def _subsampling(config: ParakeetConfig) -> Iterator[Entry]:
    ours, theirs = "subsampling", "subsampling.layers"
    names = {"first": 0}
    # A ReLU between two levels has a number too.
    for level in range(config.subsampling_factor.bit_length() - 2):
        names |= {f"depthwise.{level}": 3 * level + 2, f"pointwise.{level}": 3 * level + 3}
    for name, number in names.items():
        weight = (f"{theirs}.{number}.weight",)
        if name.startswith("pointwise"):
            yield Entry(f"{ours}.{name}.weight", weight, _without(2, 3), _with("o i -> o i 1 1"))
        else:
            yield Entry(f"{ours}.{name}.weight", weight)
        yield Entry(f"{ours}.{name}.bias", (f"{theirs}.{number}.bias",))
    channels = config.subsampling_conv_channels
    # transformers has the bins of a channel side by side, here the channels of a bin are.
    yield Entry(
        f"{ours}.linear.weight",
        ("subsampling.linear.weight",),
        lambda tensors: rearrange(tensors[0], "h (c b) -> h (b c)", c=channels),
        lambda tensor: (rearrange(tensor, "h (b c) -> h (c b)", c=channels),),
    )
    yield Entry(f"{ours}.linear.bias", ("subsampling.linear.bias",))


def _convolution(ours: str, theirs: str, config: ParakeetConfig) -> Iterator[Entry]:
    yield Entry(
        f"{ours}.pointwise_in.weight",
        (f"{theirs}.pointwise_conv1.weight",),
        _without(2),
        _with("o i -> o i 1"),
    )
    yield Entry(
        f"{ours}.depthwise.weight",
        (f"{theirs}.depthwise_conv.weight",),
        _without(1),
        _with("c k -> c 1 k"),
    )
    yield Entry(
        f"{ours}.pointwise_out.weight",
        (f"{theirs}.pointwise_conv2.weight",),
        _without(2),
        _with("o i -> o i 1"),
    )
    if config.convolution_bias:
        for here, there in (
            ("pointwise_in", "pointwise_conv1"),
            ("depthwise", "depthwise_conv"),
            ("pointwise_out", "pointwise_conv2"),
        ):
            yield Entry(f"{ours}.{here}.bias", (f"{theirs}.{there}.bias",))
    for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        yield Entry(f"{ours}.batch_norm.{kind}", (f"{theirs}.norm.{kind}",))


def _without(*axes: int) -> Any:
    """Join that drops axes of length one."""

    def join(tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        if any(tensor.size(axis) != 1 for axis in axes):
            raise ValueError(f"a kernel of shape {list(tensor.shape)}")
        return tensor.squeeze(axes)

    return join


def _with(pattern: str) -> Any:
    """Split that adds them again."""

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        return (rearrange(tensor, pattern).contiguous(),)

    return split


def load_weights(
    module: nn.Module,
    config: ParakeetConfig,
    folder: WeightFolder,
    *,
    tp_rank: int,
    tp_size: int,
) -> None:
    """Fill this rank's shard of a `ParakeetEncoder` stage from a folder, statistics included.

    Raises:
        ValueError: A weight is missing, unexpected or of another shape; the message lists them.
    """
    fill_module(
        module,
        name_table(config),
        folder,
        table_name=lambda name: name,
        tp=(tp_rank, tp_size),
        expt_tp=(0, 1),
        optional=optional_names(folder),
    )


def optional_names(folder: WeightFolder) -> frozenset[str]:
    """Names of tensors that a folder may hold beside those of `name_table`."""
    return frozenset(name for name in folder.names if name.startswith(_EXTRACTOR))


def export_weights(module: nn.Module, config: ParakeetConfig) -> dict[str, Tensor]:
    """The weights and buffers of a whole `ParakeetEncoder` by their names in transformers.

    Each keeps its dtype and has the shape [...] that transformers stores.
    """
    return export_module(module, name_table(config), table_name=lambda name: name)


def restore_weights(
    module: nn.Module, config: ParakeetConfig, folder: WeightFolder
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a whole `ParakeetEncoder` by their names in the folder it was filled from.

    Shapes [...] and dtypes are those of the folder. Weights that have not changed since are equal
    to the stored ones bit for bit (`as_stored`).
    """
    yield from as_stored(export_weights(module, config), folder)
    for name in sorted(optional_names(folder)):
        yield name, folder.tensor(name)
