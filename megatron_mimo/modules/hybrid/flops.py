"""Operations of the hybrid decoder."""

from megatron_mimo.modules.adapter import FlopsContext
from megatron_mimo.modules.flops import Flops, TextWork, attention, product
from megatron_mimo.modules.hybrid.config import HybridConfig

# Chunk of mamba-ssm's kernels in positions, as megatron-core's `MambaMixer` calls them.
MAMBA_CHUNK = 128


def hybrid_flops(
    config: HybridConfig, work: TextWork, context: FlopsContext, *, chunk: int = MAMBA_CHUNK
) -> Flops:
    """Number of operations of some work of the decoder, output layer included.

    Args:
        config: Architecture of the module.
        work: Work of the decoder.
        context: Sizes, and the parts that train.
        chunk: Number of positions of a chunk of a Mamba layer.
    """
    tokens, width = work.sequences * context.seq_length, config.hidden_size
    trains = "language" not in context.frozen
    backward = trains or context.rows_train

    def linear(inputs: int, outputs: int, through: int = tokens) -> Flops:
        return product(through, inputs, outputs, weight=trains, inputs=backward)

    inner, attended = _mamba_inner(config), config.num_attention_heads * config.kv_channels
    shared = config.moe_shared_expert_intermediate_size
    routed = tokens * config.moe_router_topk
    states = config.mamba_num_groups * config.mamba_state_dim
    layers = {
        "M": linear(width, 2 * inner + 2 * states + config.mamba_num_heads)
        + linear(inner, width)
        + _scan(config, work.sequences, context.seq_length, chunk, backward),
        "*": linear(width, attended + 2 * config.num_query_groups * config.kv_channels)
        + linear(attended, width)
        + attention(work.document_pairs, attended, backward=backward),
        "-": linear(width, 2 * config.ffn_hidden_size),
        "E": linear(width, config.num_moe_experts)
        + linear(width, 2 * config.moe_ffn_hidden_size, routed)
        + linear(width, 2 * shared),
    }
    return sum((layers[letter] for letter in config.layers), linear(width, context.vocab_size))


def _mamba_inner(config: HybridConfig) -> int:
    return config.mamba_num_heads * config.mamba_head_dim


def _scan(
    config: HybridConfig, sequences: int, seq_length: int, chunk: int, backward: bool
) -> Flops:
    """The four products of a chunked scan; the last chunk is filled up.

    Per chunk of q positions, with g groups, state size n and h heads of width p: C B^T (g q q n),
    the weighted sum over the chunk (h p q q), its contribution to the state, and its reading of the
    previous state (h p q n each).
    """
    size = min(chunk, seq_length)
    in_sequence = -(-seq_length // size)
    chunks, inner, state = sequences * in_sequence, _mamba_inner(config), config.mamba_state_dim
    inside = 2 * chunks * size * size * (config.mamba_num_groups * state + inner)
    states = 2 * chunks * size * 2 * inner * state
    # The state after a sequence's only chunk is never read: of four gradients only C's is left.
    to_states = 2 * states if in_sequence > 1 else states // 2
    return Flops(inside + states, (2 * inside + to_states) * backward)
