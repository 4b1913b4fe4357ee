"""A dense GPT over megatron-core."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType

from megatron_mimo.kernels.specs import transformer_block_spec
from megatron_mimo.modules.gpt.config import GptConfig
from megatron_mimo.modules.language.config import ExecutionConfig
from megatron_mimo.modules.language.execution import execution_settings
from megatron_mimo.runtime.megatron_core import is_first_stage, is_last_stage, transformer_config


def build_gpt(
    config: GptConfig,
    *,
    vocab_size: int,
    seq_length: int,
    pg_collection: ProcessGroupCollection,
    params_dtype: torch.dtype,
    sequence_parallel: bool,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 (frozen)
    initialize: bool = True,
) -> GPTModel:
    """Build this rank's shard of its pipeline stage.

    Under sequence parallelism the embedding scatters over the sequence itself, so that each rank
    embeds, and merges rows into (`language.merge`), its own shard only.

    Raises:
        ValueError: The vocabulary does not divide by the tensor-parallel size.
    """
    tp = pg_collection.tp.size()
    if vocab_size % tp:
        raise ValueError(
            f"vocabulary of {vocab_size} does not divide by --llm-tp {tp}: "
            f"choose a tensor-parallel size that divides it"
        )
    core_config = transformer_config(
        pg_collection,
        params_dtype=params_dtype,
        sequence_parallel=sequence_parallel,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        ffn_hidden_size=config.ffn_hidden_size,
        layernorm_epsilon=config.layernorm_epsilon,
        init_method_std=config.init_method_std,
        perform_initialization=initialize,
        **execution_settings(execution, params_dtype=params_dtype, has_experts=False),
    )
    return GPTModel(
        config=core_config,
        transformer_layer_spec=transformer_block_spec(
            core_config, attn_mask_type=AttnMaskType.causal, pp_rank=pg_collection.pp.rank()
        ),
        vocab_size=vocab_size,
        max_sequence_length=seq_length,
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        pre_process=is_first_stage(pg_collection),
        post_process=is_last_stage(pg_collection),
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
        pg_collection=pg_collection,
    )
