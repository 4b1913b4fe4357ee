"""Layers of the hybrid model, Mamba, attention, MLP and MoE: fused on a GPU, ours elsewhere.

megatron-core's own specification of them requires Transformer Engine, and its mixer requires
mamba-ssm.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from megatron_mimo.kernels.head_exchange import HeadExchange
from megatron_mimo.kernels.router import TokenRouter
from megatron_mimo.kernels.specs import spec_provider
from megatron_mimo.kernels.ssd import GroupedRMSNorm, States, split_conv_scan
from megatron_mimo.kernels.ssd_step import mixer_step


class BoundedMambaMixer(MambaMixer):
    """A Mamba-2 mixer whose steps have a lower bound, as in transformers' NemotronH.

    Context-parallel ranks share its heads, whatever tokens of a sequence each of them has.

    Args:
        args: Positional arguments of megatron-core's mixer.
        step_floor: Smallest step after softplus; 0 has no effect.
        kwargs: Keyword arguments of megatron-core's mixer.
    """

    def __init__(self, *args: Any, step_floor: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cp = HeadExchange(
            cp_group=self.pg_collection.cp,
            d_inner_local_tp=self.d_inner_local_tp,
            nheads_local_tp=self.nheads_local_tp,
            ngroups_local_tp=self.ngroups_local_tp,
            d_state=self.d_state,
            conv1d_weight_cp1=self.conv1d_weight,
            conv1d_bias_cp1=self.conv1d_bias,
            conv1d_padding=self.d_conv - 1,
            dt_bias_cp1=self.dt_bias,
            A_log_cp1=self.A_log,
            D_cp1=self.D,
            D_has_hdim=self.D_has_hdim,
        )
        # Of the sum that softplus is taken of.
        self._least = math.log(math.expm1(step_floor)) if step_floor else -math.inf

    def _ssm_training(
        self,
        zxBCdt: Tensor,  # noqa: N803 (megatron-core's name)
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Bound the steps before the scan, so that its kernels need no bound.

        Raises:
            ValueError: A packed sequence does not state which document each token belongs to; the
                scan would continue across the borders of documents.
        """
        if packed_seq_params is not None and packed_seq_params.seq_idx is None:
            raise ValueError(
                "a packed sequence without seq_idx: state would leak between documents; build its "
                "boundaries with `packed_documents`"
            )
        scanned: Tensor = super()._ssm_training(self._bounded(zxBCdt), packed_seq_params)
        return scanned

    def _ssm_prefill(
        self,
        zxBCdt: Tensor,  # noqa: N803
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        **dynamic: Any,
    ) -> Tensor:
        """Read a prompt [l, b, d], and keep the states after its last token."""
        bounded = self._bounded(zxBCdt)
        if not _scans_in_torch():
            read: Tensor = super()._ssm_prefill(bounded, conv_state, ssm_state, **dynamic)
            return read
        assert conv_state is not None and ssm_state is not None
        y = split_conv_scan(
            bounded.transpose(0, 1),
            *self._weights(),
            self.chunk_size,
            headdim=self.headdim,
            ngroups=self.ngroups_local_tp,
            states=States(conv_state, ssm_state),
        )
        normed: Tensor = self.norm(y.transpose(0, 1))
        return normed

    def _ssm_decode(
        self,
        zxBCdt: Tensor,  # noqa: N803
        conv_state: Tensor,
        ssm_state: Tensor,
        **dynamic: Any,
    ) -> Tensor:
        """Read one token [1, b, d], and move the states on."""
        bounded = self._bounded(zxBCdt)
        if not _scans_in_torch():
            read: Tensor = super()._ssm_decode(bounded, conv_state, ssm_state, **dynamic)
            return read
        y = mixer_step(
            bounded[0],
            *self._weights(),
            headdim=self.headdim,
            ngroups=self.ngroups_local_tp,
            states=States(conv_state, ssm_state),
        )
        normed: Tensor = self.norm(y[None])
        return normed

    def _get_states_from_cache(
        self, inference_context: Any, batch_size: int, *, inference_params: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The states of this layer, zeros at first; megatron-core's would round with each token."""
        kept = inference_context.key_value_memory_dict
        if self.layer_number not in kept:
            of_conv, of_scan = self.mamba_state_shapes_per_request()
            dtype = self.conv1d_weight.dtype
            kept[self.layer_number] = (
                self.conv1d_weight.new_zeros(batch_size, *of_conv),
                self.conv1d_weight.new_zeros(
                    batch_size, *of_scan, dtype=torch.promote_types(dtype, torch.float32)
                ),
            )
        states: tuple[Tensor, Tensor] = kept[self.layer_number]
        return states

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the convolution, bias of the steps, decay rates, and D."""
        convolution = self.conv1d_weight.squeeze(1), self.conv1d_bias
        return *convolution, self.dt_bias.float(), -self.A_log.float().exp(), self.D

    def _bounded(self, zxBCdt: Tensor) -> Tensor:  # noqa: N803
        """Steps with their lower bound, in front of the bias: there its gradient is zero."""
        if self._least == -math.inf:
            return zxBCdt
        bias = self.cp.get_dt_bias()
        rest, dt = zxBCdt.tensor_split([-len(bias)], dim=-1)
        return torch.cat([rest, dt.maximum((self._least - bias).to(dt.dtype))], dim=-1)


def hybrid_stack_spec(config: TransformerConfig, *, step_floor: float = 0.0) -> ModuleSpec:
    """Specification of the layers that `HybridModel` builds.

    Args:
        config: Configuration of the layers; it states how many experts there are, if any.
        step_floor: Smallest step of a Mamba layer.
    """
    _fill_in_what_is_absent()
    provider = spec_provider()
    fused = provider.fuse_layernorm_and_linear()
    norm = IdentityOp if fused else provider.layer_norm(has_residual=True)
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(
                    norm=norm,
                    mixer=ModuleSpec(
                        module=BoundedMambaMixer,
                        params={"step_floor": step_floor},
                        submodules=MambaMixerSubmodules(
                            in_proj=_linear_behind_norm(provider),
                            out_proj=provider.row_parallel_linear(),
                        ),
                    ),
                    mamba_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map={}
                    if fused
                    else {"norm.": "mixer.in_proj.layer_norm_"},
                ),
            ),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=norm,
                    self_attention=ModuleSpec(
                        module=SelfAttention,
                        params={"attn_mask_type": AttnMaskType.causal},
                        submodules=SelfAttentionSubmodules(
                            linear_qkv=_linear_behind_norm(provider),
                            core_attention=provider.core_attention(),
                            linear_proj=provider.row_parallel_linear(),
                        ),
                    ),
                    self_attn_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map={}
                    if fused
                    else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=norm,
                    mlp=partial(
                        MLP.as_mlp_submodule,
                        submodules=MLPSubmodules(
                            linear_fc1=_linear_behind_norm(provider),
                            linear_fc2=provider.row_parallel_linear(),
                        ),
                    ),
                    mlp_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map={}
                    if fused
                    else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
                ),
            ),
            moe_layer=IdentityOp
            if config.num_moe_experts is None
            else ModuleSpec(
                module=MoETransformerLayer,
                submodules=TransformerLayerSubmodules(
                    # The router reads its output too, so it is never fused.
                    pre_mlp_layernorm=provider.layer_norm(has_residual=True),
                    mlp=_experts(config, provider),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
        ),
    )


def describe_hybrid() -> str:
    """One line on the implementations of the layers that only a hybrid model has."""
    _fill_in_what_is_absent()
    ours = _scans_in_torch()
    grouped = spec_provider().fuse_layernorm_and_linear()
    return (
        f"Mamba layers: {'chunked scan in torch' if ours else 'mamba-ssm'} | experts: "
        f"{'grouped products' if grouped else 'one after the other'}"
    )


def _scans_in_torch() -> bool:
    """Whether Mamba layers run ours: mamba-ssm is absent."""
    return mamba_mixer.mamba_split_conv1d_scan_combined is split_conv_scan


def _linear_behind_norm(provider: BackendSpecProvider) -> Any:
    return provider.column_parallel_layer_norm_linear() or provider.column_parallel_linear()


def _experts(config: TransformerConfig, provider: BackendSpecProvider) -> Any:
    """megatron-core's layer of experts behind our router."""
    builder: Any = get_moe_module_spec_for_backend(
        backend=provider,
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
    )
    submodules = replace(builder.keywords["submodules"], router=TokenRouter)
    return partial(builder.func, submodules=submodules)


def _fill_in_what_is_absent() -> None:
    """Give megatron-core our scan without mamba-ssm, our norm without Transformer Engine.

    megatron-core looks these names up when a mixer or a stack is built and run.
    """
    mixer: Any = mamba_mixer
    if not mixer.HAVE_MAMBA_SSM:
        mixer.HAVE_MAMBA_SSM = True
        mixer.ExtendedRMSNorm = GroupedRMSNorm
        mixer.mamba_split_conv1d_scan_combined = split_conv_scan
        mixer._check_mamba_sequence_packing_support = lambda **_kwargs: (True, None)
    if not spec_provider().fuse_layernorm_and_linear():
        # The stack's last norm is Transformer Engine's by name.
        block: Any = hybrid_block
        block.TENorm = spec_provider().layer_norm(has_residual=False)
