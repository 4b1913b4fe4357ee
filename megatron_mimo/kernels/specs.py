"""Which layers a transformer is built from: Transformer Engine's on a GPU, ours elsewhere.

Model builders use these functions and never ask for a device. This module imports megatron-core, so
`initialize` has to be called first.
"""

import logging
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_mimo.kernels.attention import SdpaCoreAttention
from megatron_mimo.kernels.host_layers import (
    HostColumnParallelLinear,
    HostExperts,
    HostRowParallelLinear,
)
from megatron_mimo.kernels.layer_scale import ScaledAdd
from megatron_mimo.kernels.norms import TorchNorm
from megatron_mimo.kernels.self_attention import PackedSelfAttention

logger = logging.getLogger(__name__)


class HostSpecProvider(LocalSpecProvider):
    """megatron-core's own layers, with norms and attention that support hosts and packing."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> LayerNormBuilder:
        """The norm class; the configuration states which norm it is."""
        return TorchNorm

    def column_parallel_linear(self) -> type:
        """Linear layer with a sharded output."""
        return HostColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Linear layer with a sharded input."""
        return HostRowParallelLinear

    def core_attention(self) -> type:
        """Attention over torch's scaled dot product."""
        return SdpaCoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Experts one after the other, made of megatron-core's linear layers."""
        builder: Any = super().grouped_mlp_modules(moe_use_grouped_gemm)
        return partial(HostExperts, *builder.args, **builder.keywords)


def spec_provider() -> BackendSpecProvider:
    """Provider of Transformer Engine's layers where it and a GPU are present, else of ours."""
    if has_fused_layers():
        from megatron_mimo.kernels.fused_layers import FusedSpecProvider

        return FusedSpecProvider()
    return HostSpecProvider()


def has_fused_layers() -> bool:
    """Whether layers are those of Transformer Engine: it and a GPU are present."""
    return bool(HAVE_TE and torch.cuda.is_available())


def norm_class() -> LayerNormBuilder:
    """Class of a norm outside of a layer, called with `config`, `hidden_size` and `eps`."""
    return spec_provider().layer_norm()


def transformer_layer_spec(
    config: TransformerConfig, *, attn_mask_type: AttnMaskType, layer_scale: bool = False
) -> ModuleSpec:
    """A pre-norm layer: self-attention, then an MLP, or experts where the configuration has them.

    Norms in front of a dense linear layer are fused into it by Transformer Engine. Sharded
    checkpoints carry its names on a host too.

    Args:
        config: Configuration of the layer; it states whether queries and keys are normalised, and
            how many experts there are.
        attn_mask_type: Type of mask of the attention, such as `causal` or `no_mask`.
        layer_scale: Whether attention and MLP are followed by a trained scale.

    Raises:
        ValueError: The configuration recomputes MLPs that have biases.
    """
    _require_recomputable(config)
    provider = spec_provider()
    fused = provider.fuse_layernorm_and_linear()
    norm = provider.layer_norm(has_residual=True)
    qk_norm = provider.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    experts = config.num_moe_experts
    # Names of separate norms in a checkpoint; experts' router keeps the norm in front separate.
    names = {} if fused else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not fused and experts is None:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    add: Any = get_bias_dropout_add
    if layer_scale:
        sizes = {"hidden_size": config.hidden_size, "dtype": config.params_dtype}
        add = ModuleSpec(module=ScaledAdd, params=sizes)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=ModuleSpec(
                module=PackedSelfAttention,
                params={"attn_mask_type": attn_mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=(
                        provider.column_parallel_layer_norm_linear()
                        if fused
                        else provider.column_parallel_linear()
                    ),
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=add,
            pre_mlp_layernorm=IdentityOp if fused and experts is None else norm,
            mlp=get_mlp_module_spec_for_backend(
                backend=provider,
                num_experts=experts,
                moe_grouped_gemm=config.moe_grouped_gemm,
            ),
            mlp_bda=add,
            sharded_state_dict_keys_map=names,
        ),
    )


def transformer_block_spec(
    config: TransformerConfig,
    *,
    attn_mask_type: AttnMaskType,
    post_layer_norm: bool = True,
    pp_rank: int = 0,
    layer_scale: bool = False,
) -> TransformerBlockSubmodules:
    """Layers of a pipeline stage, and the norm after the last: for `TransformerBlock(spec=)`.

    Args:
        config: Configuration of the block; `num_layers` counts the layers of all stages.
        attn_mask_type: Type of mask of the attention.
        post_layer_norm: Whether the block ends with a norm.
        pp_rank: Pipeline stage, from 0.
        layer_scale: Whether attention and MLP are followed by a trained scale.

    Raises:
        ValueError: The configuration recomputes MLPs that have biases.
    """
    layer = transformer_layer_spec(config, attn_mask_type=attn_mask_type, layer_scale=layer_scale)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, pp_rank=pp_rank),
        layer_norm=spec_provider().layer_norm(has_residual=False) if post_layer_norm else None,
    )


def describe() -> str:
    """One line on what computes: device, backend, attention and norm."""
    provider = spec_provider()
    engine = "Transformer Engine" if provider.fuse_layernorm_and_linear() else "torch"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "host"
    backend = (
        torch.distributed.get_backend()
        if torch.distributed.is_initialized()
        else "no process group"
    )
    return (
        f"device {device} | backend {backend} | {engine} kernels: attention "
        f"{provider.core_attention().__name__}, norm {_name(provider.layer_norm())}"
    )


def _require_recomputable(config: TransformerConfig) -> None:
    """Refuse recomputation that never ends: an MLP returns its bias, which depends on itself."""
    modules = config.recompute_modules or ()
    if config.recompute_granularity == "selective" and "mlp" in modules and config.add_bias_linear:
        raise ValueError(
            "--recompute-modules mlp with biases in linear layers: backward would recompute "
            "without end in megatron-core; leave mlp out, or use --recompute-granularity full"
        )


def _name(builder: LayerNormBuilder) -> str:
    return str(getattr(builder, "__name__", builder))
