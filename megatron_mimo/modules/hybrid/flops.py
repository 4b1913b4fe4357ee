"""Operations of the hybrid decoder."""

from megatron_mimo.modules.adapter import FlopsContext
from megatron_mimo.modules.flops import Flops, TextWork, attention
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
    backward = context.trains("language") or context.rows_train
    linear = context.linear("language", backward=backward)
    widths = linear_widths(config)

    def layer(name: str, parts: int = 1) -> Flops:
        return linear(name, tokens, *widths[name], parts=parts)

    attended = config.num_attention_heads * config.kv_channels
    routed = tokens * config.moe_router_topk
    layers = {
        "M": layer("in_proj")
        + layer("out_proj")
        + _scan(config, work.sequences, context.seq_length, chunk, backward),
        "*": layer("linear_qkv", parts=3)
        + layer("linear_proj")
        + attention(work.document_pairs, attended, backward=backward),
        "-": layer("linear_fc1") + layer("linear_fc2"),
        "E": linear("", tokens, width, config.num_moe_experts)
        + linear("", routed, width, 2 * config.moe_ffn_hidden_size)
        + layer("shared_experts.linear_fc1")
        + layer("shared_experts.linear_fc2"),
    }
    output = linear("", tokens, width, context.vocab_size)
    return sum((layers[letter] for letter in config.layers), output)


def linear_widths(config: HybridConfig) -> dict[str, tuple[int, int]]:
    """Widths of input and output of the linear layers of every kind of layer, by name."""
    width, inner = config.hidden_size, _mamba_inner(config)
    attended = config.num_attention_heads * config.kv_channels
    shared, states = (
        config.moe_shared_expert_intermediate_size,
        config.mamba_num_groups * config.mamba_state_dim,
    )
    return {
        "in_proj": (width, 2 * inner + 2 * states + config.mamba_num_heads),
        "out_proj": (inner, width),
        "linear_qkv": (width, attended + 2 * config.num_query_groups * config.kv_channels),
        "linear_proj": (attended, width),
        "linear_fc1": (width, config.ffn_hidden_size),
        "linear_fc2": (config.ffn_hidden_size, width),
        "shared_experts.linear_fc1": (width, shared),
        "shared_experts.linear_fc2": (shared, width),
    }


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
