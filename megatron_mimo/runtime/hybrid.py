"""Layers of the hybrid model, Mamba, attention, MLP and MoE: fused on a GPU, ours elsewhere.

megatron-core's own specification of them asks for Transformer Engine, and its mixer for mamba-ssm.
"""

import math
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

from megatron_mimo.runtime.specs import spec_provider
from megatron_mimo.runtime.ssd import GroupedRMSNorm, split_conv_scan


class BoundedMambaMixer(MambaMixer):
    """A Mamba-2 mixer whose steps have a lower bound, as in transformers' NemotronH.

    Args:
        args: Of megatron-core's mixer.
        step_floor: Least step, behind softplus; 0 has no effect.
        kwargs: Of megatron-core's mixer.
    """

    def __init__(self, *args: Any, step_floor: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Of the sum that softplus is taken of.
        self._least = math.log(math.expm1(step_floor)) if step_floor else -math.inf

    def _ssm_training(
        self,
        zxBCdt: Tensor,  # noqa: N803 (megatron-core's name)
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Raise the steps in front of the scan, whose kernels need not know of a bound.

        Raises:
            ValueError: A packed sequence that does not say which document each token is of; the
                scan would run on across their borders.
        """
        if packed_seq_params is not None and packed_seq_params.seq_idx is None:
            raise ValueError(
                "a packed sequence without seq_idx: state would leak between documents; build its "
                "boundaries with `packed_documents`"
            )
        if self._least > -math.inf:
            bias = self.cp.get_dt_bias()
            rest, dt = zxBCdt.tensor_split([-len(bias)], dim=-1)
            # In front of the bias, so that where the bound holds its gradient is zero.
            bounded = torch.cat([rest, dt.maximum((self._least - bias).to(dt.dtype))], dim=-1)
        else:
            bounded = zxBCdt
        scanned: Tensor = super()._ssm_training(bounded, packed_seq_params)
        return scanned


def hybrid_stack_spec(config: TransformerConfig, *, step_floor: float = 0.0) -> ModuleSpec:
    """What `HybridModel` builds its layers from.

    Args:
        config: Says how many experts there are, if any.
        step_floor: Least step of a Mamba layer.
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
                    mlp=get_moe_module_spec_for_backend(
                        backend=provider,
                        num_experts=config.num_moe_experts,
                        moe_grouped_gemm=config.moe_grouped_gemm,
                    ),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
        ),
    )


def describe_hybrid() -> str:
    """One line on what computes the layers that only a hybrid model has."""
    _fill_in_what_is_absent()
    ours = mamba_mixer.mamba_split_conv1d_scan_combined is split_conv_scan
    grouped = spec_provider().fuse_layernorm_and_linear()
    return (
        f"Mamba layers: {'chunked scan in torch' if ours else 'mamba-ssm'} | experts: "
        f"{'grouped products' if grouped else 'one after the other'}"
    )


def _linear_behind_norm(provider: BackendSpecProvider) -> Any:
    return provider.column_parallel_layer_norm_linear() or provider.column_parallel_linear()


def _fill_in_what_is_absent() -> None:
    """Give megatron-core our scan where mamba-ssm is missing, and our norm without a GPU.

    It looks these names up when a mixer or a stack is built and run.
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
