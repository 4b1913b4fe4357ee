"""A small GPT on its own grid, for tests that train one."""

from typing import TYPE_CHECKING, Any

from megatron_mimo.topology import Layout, ModuleGridSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megatron_mimo.topology.groups import ModuleGroups

VOCAB, LENGTH, BATCH = 32, 8, 4


def llm_layout(**sizes: int) -> Layout:
    """A language model alone."""
    grid = ModuleGridSpec(name="llm", **sizes)
    return Layout.of(grid, world_size=len(grid.ranks))


def build_gpt(module: "ModuleGroups", architecture: dict[str, Any]) -> Any:
    """A small GPT on a module's groups, seeded for its place."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mimo.kernels.specs import transformer_block_spec
    from megatron_mimo.runtime import seed_everything

    groups, place = module.pg_collection, module.place
    defaults = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "tensor_model_parallel_size": groups.tp.size(),
        "expert_model_parallel_size": groups.ep.size(),
        "expert_tensor_parallel_size": groups.expt_tp.size(),
        "sequence_parallel": groups.tp.size() > 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
    }
    config = TransformerConfig(**defaults | architecture)
    seed_everything(1, tp_rank=place.tp, pp_rank=0, dp_rank=place.dp, ep_rank=place.ep)
    return GPTModel(
        config=config,
        transformer_layer_spec=transformer_block_spec(config, attn_mask_type=AttnMaskType.causal),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        pg_collection=groups,
    )


def losses_of(model: Any, module: "ModuleGroups") -> "Tensor":
    """Losses [B/dp, S] of this dp rank's share of the one global batch."""
    import torch

    tokens = torch.randint(
        0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(2)
    )
    share = tokens.chunk(module.pg_collection.dp.size())[module.place.dp]
    positions = torch.arange(LENGTH).expand(share.size(0), -1)
    losses: Tensor = model(share[:, :-1], positions, attention_mask=None, labels=share[:, 1:])
    return losses


def named(model: "nn.Module") -> "list[tuple[str, nn.Parameter]]":
    """Parameters with their names."""
    return list(model.named_parameters())
