"""Architecture of the dense decoder."""

from dataclasses import dataclass
from typing import Annotated

from megatron_mimo.settings import MoreThan, Within, check_fields, check_multiple
from megatron_mimo.settings.ranges import MOST_LAYERS, MOST_WIDTH


@dataclass(frozen=True, kw_only=True, slots=True)
class GptConfig:
    """Architecture of a dense decoder.

    Attributes:
        num_layers: Number of transformer layers.
        hidden_size: Width of a token's embedding, H.
        num_attention_heads: Number of attention heads.
        num_query_groups: Number of key-value heads.
        ffn_hidden_size: Width inside the MLP.
        rotary_base: Base period of the rotary position embedding.
        layernorm_epsilon: Epsilon of every LayerNorm.
        init_method_std: Standard deviation of the initial weights.
        share_embeddings_and_output_weights: Whether the output layer is tied to the word
            embeddings.
    """

    num_layers: Annotated[int, Within(1, MOST_LAYERS)] = 4
    hidden_size: Annotated[int, Within(1, MOST_WIDTH)] = 128
    num_attention_heads: Annotated[int, Within(1, MOST_WIDTH)] = 4
    num_query_groups: Annotated[int, Within(1, MOST_WIDTH)] = 2
    ffn_hidden_size: Annotated[int, Within(1, MOST_WIDTH)] = 512
    rotary_base: Annotated[int, Within(1, 10**12)] = 10000
    layernorm_epsilon: Annotated[float, Within(1e-20, 1)] = 1e-5
    init_method_std: Annotated[float, MoreThan(0, 100)] = 0.02
    share_embeddings_and_output_weights: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_multiple(self, "hidden_size", "num_attention_heads")
        check_multiple(self, "num_attention_heads", "num_query_groups")
        if self.hidden_size // self.num_attention_heads % 2:
            # Its channels are rotated in pairs.
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_attention_heads "
                f"{self.num_attention_heads}: expected an even number of channels of a head"
            )
