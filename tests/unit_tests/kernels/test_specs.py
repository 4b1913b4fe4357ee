"""Whole models from our specs: the same loss and gradients on every layout."""

import re
from typing import TYPE_CHECKING, Any

import pytest

from megatron_mimo.topology import Layout
from tests.harness import RunRanks
from tests.unit_tests.kernels.small_gpt import build_gpt, llm_layout, losses_of, named

if TYPE_CHECKING:
    from torch import Tensor, nn

EXPERTS = 4

DENSE: dict[str, Any] = {"num_query_groups": 2, "qk_layernorm": True}
MOE: dict[str, Any] = {
    "num_moe_experts": EXPERTS,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
    "add_bias_linear": False,
    "normalization": "RMSNorm",
}


def train_once(layout: Layout, architecture: dict[str, Any]) -> "tuple[float, dict[str, Tensor]]":
    """Loss and gradients, unsharded, of one forward and backward over one global batch.

    Every rank holds the whole result. Experts of all ep ranks appear under their global number.
    """
    import torch.distributed as dist

    from megatron_mimo.topology.groups import build_topology

    module = build_topology(layout).target
    assert module is not None
    groups, place = module.pg_collection, module.place
    model = build_gpt(module, architecture)
    names = {name: global_name(name, place.ep, groups.ep.size()) for name, _ in named(model)}
    if model.config.num_moe_experts:
        fill_by_name(model, names)
    losses = losses_of(model, module)
    losses.sum().backward()

    total = losses.detach().sum()
    dist.all_reduce(total, group=groups.dp)
    gradients: dict[str, Tensor] = {}
    for name, parameter in named(model):
        gradient = parameter.grad
        # What megatron-core does when it finalises gradients.
        if getattr(parameter, "sequence_parallel", False) or re.search("[qk]_layernorm", name):
            dist.all_reduce(gradient, group=groups.tp)
        dist.all_reduce(gradient, group=groups.expt_dp if is_expert(name) else groups.dp)
        gradients[names[name]] = unshard(gradient, parameter, groups.tp)
    gathered: list[dict[str, Tensor]] = [{}] * groups.ep.size()
    dist.all_gather_object(gathered, gradients, group=groups.ep)
    return float(total), {name: grad for part in gathered for name, grad in part.items()}


def is_expert(name: str) -> bool:
    return "local_experts" in name


def global_name(name: str, ep_rank: int, ep_size: int) -> str:
    """Name with the expert's number among all experts."""
    first = ep_rank * (EXPERTS // ep_size)
    return re.sub(r"local_experts\.(\d+)", lambda found: f"experts.{first + int(found[1])}", name)


def fill_by_name(model: "nn.Module", names: dict[str, str]) -> None:
    """Weights that follow from global names: ranks with fewer experts draw fewer numbers."""
    import zlib

    import torch

    for name, parameter in named(model):
        if parameter.dim() > 1:
            generator = torch.Generator().manual_seed(zlib.crc32(names[name].encode()))
            with torch.no_grad():
                parameter.normal_(std=0.05, generator=generator)


def unshard(gradient: "Tensor", parameter: "nn.Parameter", group: Any) -> "Tensor":
    """Join the shards of a tensor-parallel parameter."""
    import torch
    import torch.distributed as dist

    if not getattr(parameter, "tensor_model_parallel", False) or group.size() == 1:
        return gradient.clone()
    shards = [torch.empty_like(gradient) for _ in range(group.size())]
    dist.all_gather(shards, gradient.contiguous(), group=group)
    return torch.cat(shards, dim=parameter.partition_dim)


def assert_same(
    runs: "list[tuple[float, dict[str, Tensor]]]", wanted: "tuple[float, dict[str, Tensor]]"
) -> None:
    """Every rank's loss and gradients equal the one-rank run's."""
    import torch

    for loss, gradients in runs:
        assert loss == pytest.approx(wanted[0], rel=1e-6)
        assert gradients.keys() == wanted[1].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, wanted[1][name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_tensor_parallel_equals_one_rank(run_ranks: RunRanks, normalization: str) -> None:
    architecture = DENSE | {"normalization": normalization}
    (wanted,) = run_ranks(1, train_once, llm_layout(), architecture)
    assert wanted[0] > 0
    assert_same(run_ranks(2, train_once, llm_layout(tp=2), architecture), wanted)


def test_expert_parallel_equals_one_rank(run_ranks: RunRanks) -> None:
    (wanted,) = run_ranks(1, train_once, llm_layout(), MOE)
    assert sum(".experts." in name for name in wanted[1]) == 2 * 2 * EXPERTS
    assert_same(run_ranks(2, train_once, llm_layout(dp=2, ep=2), MOE), wanted)


def packed_equals_separate(mask: str) -> float:
    """Largest difference between a packed block and a run of each sequence alone."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mimo.kernels.specs import transformer_block_spec
    from megatron_mimo.runtime import seed_everything
    from megatron_mimo.topology.groups import build_topology

    module = build_topology(llm_layout()).target
    assert module is not None
    seed_everything(1, tp_rank=0, pp_rank=0, dp_rank=0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
    )
    block = TransformerBlock(
        config,
        transformer_block_spec(config, attn_mask_type=AttnMaskType[mask]),
        pg_collection=module.pg_collection,
    )
    lengths = [5, 3, 5, 1]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    tokens = torch.randn(sum(lengths), 1, 32)
    together = block(tokens, attention_mask=None, packed_seq_params=packed)
    alone = torch.cat([block(part, attention_mask=None) for part in tokens.split(lengths)])
    return float((together - alone).abs().max())


@pytest.mark.parametrize("mask", ["causal", "no_mask"])
def test_packed_block_equals_separate_sequences(run_ranks: RunRanks, mask: str) -> None:
    assert run_ranks(1, packed_equals_separate, mask)[0] < 1e-5


def layout_of_block(architecture: dict[str, Any], **block: Any) -> tuple[int, str, str, set[str]]:
    """Layers, final norm, attention, and what checkpoints call a layer's norms."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mimo.kernels.specs import transformer_block_spec

    config = TransformerConfig(
        **{"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4} | architecture
    )
    spec = transformer_block_spec(config, attn_mask_type=AttnMaskType.no_mask, **block)
    layer = spec.layer_specs[0].submodules
    return (
        len(spec.layer_specs),
        getattr(spec.layer_norm, "__name__", "none"),
        layer.self_attention.submodules.core_attention.__name__,
        set(layer.sharded_state_dict_keys_map.values()),
    )


QKV_NORM, MLP_NORM = "self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"


def test_block_spec(run_ranks: RunRanks) -> None:
    assert run_ranks(1, layout_of_block, {}) == [
        (4, "TorchNorm", "SdpaCoreAttention", {QKV_NORM, MLP_NORM})
    ]


def test_stage_of_a_pipeline_without_a_final_norm(run_ranks: RunRanks) -> None:
    pipeline = {"pipeline_model_parallel_size": 2, "pipeline_dtype": None}
    found = run_ranks(1, middle_stage, pipeline)
    assert found == [(2, "none", "SdpaCoreAttention", {QKV_NORM, MLP_NORM})]


def middle_stage(architecture: dict[str, Any]) -> tuple[int, str, str, set[str]]:
    """The second stage of a pipeline, without the norm at its end."""
    import torch

    architecture = architecture | {"pipeline_dtype": torch.float32}
    return layout_of_block(architecture, post_layer_norm=False, pp_rank=1)


def test_norm_before_experts_keeps_its_name(run_ranks: RunRanks) -> None:
    assert run_ranks(1, layout_of_block, MOE)[0][3] == {QKV_NORM}


def described() -> str:
    from megatron_mimo.kernels.specs import describe

    return describe()


def test_description(run_ranks: RunRanks) -> None:
    assert run_ranks(1, described) == [
        "device host | backend gloo | torch kernels: attention SdpaCoreAttention, norm TorchNorm"
    ]
