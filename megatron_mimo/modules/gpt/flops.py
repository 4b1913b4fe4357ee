"""Operations of the dense decoder."""

from megatron_mimo.modules.adapter import FlopsContext
from megatron_mimo.modules.flops import Flops, TextWork, attention, product
from megatron_mimo.modules.gpt.config import GptConfig


def gpt_flops(config: GptConfig, work: TextWork, context: FlopsContext) -> Flops:
    """Number of operations of some work of the decoder, output layer included.

    Args:
        config: Architecture of the module.
        work: Work of the decoder.
        context: Sizes, and the parts that train.
    """
    tokens, width = work.sequences * context.seq_length, config.hidden_size
    trains = "language" not in context.frozen
    backward = trains or context.rows_train

    def linear(inputs: int, outputs: int) -> Flops:
        return product(tokens, inputs, outputs, weight=trains, inputs=backward)

    head = width // config.num_attention_heads
    layer = linear(width, head * (config.num_attention_heads + 2 * config.num_query_groups))
    layer += linear(head * config.num_attention_heads, width)
    layer += attention(work.document_pairs, head * config.num_attention_heads, backward=backward)
    layer += linear(width, 2 * config.ffn_hidden_size)
    return linear(width, context.vocab_size) + layer * config.num_layers
