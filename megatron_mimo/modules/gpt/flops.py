"""Operations of the dense decoder."""

from megatron_mimo.modules.adapter import FlopsContext
from megatron_mimo.modules.flops import Flops, TextWork, attention
from megatron_mimo.modules.gpt.config import GptConfig


def gpt_flops(config: GptConfig, work: TextWork, context: FlopsContext) -> Flops:
    """Number of operations of some work of the decoder, output layer included.

    Args:
        config: Architecture of the module.
        work: Work of the decoder.
        context: Sizes, and the parts that train.
    """
    tokens, width = work.sequences * context.seq_length, config.hidden_size
    backward = context.trains("language") or context.rows_train
    linear = context.linear("language", backward=backward)
    heads = width // config.num_attention_heads * config.num_attention_heads
    qkv, inner = attention_outputs(config), config.ffn_hidden_size
    layer = linear("linear_qkv", tokens, width, qkv, parts=3)
    layer += linear("linear_proj", tokens, heads, width)
    layer += attention(work.document_pairs, heads, backward=backward)
    layer += linear("linear_fc1", tokens, width, inner)
    layer += linear("linear_fc2", tokens, inner, width)
    return linear("", tokens, width, context.vocab_size) + layer * config.num_layers


def attention_outputs(config: GptConfig) -> int:
    """Width of queries, keys and values together."""
    head = config.hidden_size // config.num_attention_heads
    return head * (config.num_attention_heads + 2 * config.num_query_groups)
