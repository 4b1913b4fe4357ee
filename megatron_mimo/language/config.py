"""Architectures of the language models."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GptConfig:
    """Architecture of a dense decoder.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: H, width of a token's embedding.
        num_attention_heads: Attention heads.
        num_query_groups: Key-value heads.
        ffn_hidden_size: Width inside the MLP.
        rotary_base: Base period of the rotary position embedding.
        layernorm_epsilon: Of every LayerNorm.
        init_method_std: Standard deviation of the initial weights.
        share_embeddings_and_output_weights: Tie the output layer to the word embeddings.
    """

    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_query_groups: int = 2
    ffn_hidden_size: int = 512
    rotary_base: int = 10000
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    share_embeddings_and_output_weights: bool = False
