"""Architecture of the hybrid decoder."""

from dataclasses import dataclass
from typing import Annotated

from megatron_mimo.settings import MoreThan, Within, check_fields, check_multiple
from megatron_mimo.settings.ranges import MOST_LAYERS, MOST_WIDTH


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridConfig:
    """Architecture of a decoder of Mamba-2, MoE, attention and MLP layers (Nemotron-H).

    Attributes:
        pattern: Letter of each layer: M Mamba-2, E experts, * attention, - MLP. Bars separate
            pipeline stages; without bars, stages get equal numbers of layers.
        hidden_size: Width of a token's embedding, H.
        num_attention_heads: Number of attention heads.
        num_query_groups: Number of key-value heads.
        kv_channels: Width of an attention head.
        ffn_hidden_size: Width inside an MLP layer.
        mamba_num_heads: Number of heads of a Mamba layer.
        mamba_head_dim: Width of such a head.
        mamba_num_groups: Number of groups of those heads that share B and C.
        mamba_state_dim: Size of a head's state.
        mamba_step_floor: Smallest step of a Mamba layer; transformers sets one, Megatron has 0.
        num_moe_experts: Number of experts of an E layer.
        moe_router_topk: Number of experts that a token is sent to.
        moe_ffn_hidden_size: Width inside an expert.
        moe_shared_expert_intermediate_size: Width inside the expert that every token is sent to.
        moe_router_topk_scaling_factor: Factor of the weights of the chosen experts.
        moe_aux_loss_coeff: Weight of the load-balancing loss of each sequence.
        moe_router_bias_update_rate: Step of the bias that balances the experts' load.
        moe_router_force_load_balancing: Whether tokens are sent to experts at random, evenly; for
            benchmarks.
        layernorm_epsilon: Epsilon of every RMSNorm.
        init_method_std: Standard deviation of the initial weights.
        share_embeddings_and_output_weights: Whether the output layer is tied to the word
            embeddings.
    """

    pattern: str = "M-M*"
    hidden_size: Annotated[int, Within(1, MOST_WIDTH)] = 128
    num_attention_heads: Annotated[int, Within(1, MOST_WIDTH)] = 4
    num_query_groups: Annotated[int, Within(1, MOST_WIDTH)] = 2
    kv_channels: Annotated[int, Within(1, MOST_WIDTH)] = 32
    ffn_hidden_size: Annotated[int, Within(1, MOST_WIDTH)] = 512
    mamba_num_heads: Annotated[int, Within(1, MOST_WIDTH)] = 8
    mamba_head_dim: Annotated[int, Within(1, MOST_WIDTH)] = 32
    mamba_num_groups: Annotated[int, Within(1, MOST_WIDTH)] = 2
    mamba_state_dim: Annotated[int, Within(1, MOST_WIDTH)] = 32
    mamba_step_floor: Annotated[float, Within(0, 100)] = 0.0
    num_moe_experts: Annotated[int, Within(1, MOST_WIDTH)] = 8
    moe_router_topk: Annotated[int, Within(1, MOST_WIDTH)] = 2
    moe_ffn_hidden_size: Annotated[int, Within(1, MOST_WIDTH)] = 128
    moe_shared_expert_intermediate_size: Annotated[int, Within(1, MOST_WIDTH)] = 256
    moe_router_topk_scaling_factor: Annotated[float, MoreThan(0, 1000)] = 1.0
    moe_aux_loss_coeff: Annotated[float, Within(0, 1000)] = 1e-4
    moe_router_bias_update_rate: Annotated[float, Within(0, 10)] = 1e-3
    moe_router_force_load_balancing: bool = False
    layernorm_epsilon: Annotated[float, Within(1e-20, 1)] = 1e-5
    init_method_std: Annotated[float, MoreThan(0, 100)] = 0.02
    share_embeddings_and_output_weights: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_multiple(self, "num_attention_heads", "num_query_groups")
        check_multiple(self, "mamba_num_heads", "mamba_num_groups")
        if self.moe_router_topk > self.num_moe_experts:
            raise ValueError(
                f"moe_router_topk is {self.moe_router_topk}: expected at most num_moe_experts, "
                f"which is {self.num_moe_experts}"
            )
        unknown = sorted(set(self.pattern) - set("ME*-|"))
        if unknown or not self.layers:
            raise ValueError(
                f"pattern {self.pattern!r}: expected letters M, E, * and -, one for each layer, "
                f"and | between pipeline stages"
            )
        if self.num_layers > MOST_LAYERS:
            raise ValueError(
                f"pattern has {self.num_layers} layers: expected at most {MOST_LAYERS}"
            )

    @property
    def layers(self) -> str:
        """The letters without bars."""
        return self.pattern.replace("|", "")

    @property
    def num_layers(self) -> int:
        """Number of layers of all stages."""
        return len(self.layers)

    def stages(self, number: int) -> tuple[str, ...]:
        """The letters of each pipeline stage.

        Raises:
            ValueError: The bars give another number of stages, or layers do not divide evenly.
        """
        if "|" in self.pattern:
            stages = tuple(self.pattern.split("|"))
            if len(stages) != number or not all(stages):
                raise ValueError(
                    f"pattern {self.pattern!r} has {len(stages)} stages between its bars, --llm-pp "
                    f"is {number}: change one of them"
                )
            return stages
        each, left = divmod(self.num_layers, number)
        if left:
            raise ValueError(
                f"--llm-pp {number} does not divide the {self.num_layers} layers of pattern "
                f"{self.pattern!r}: put bars where its stages begin, or change one of them"
            )
        return tuple(self.layers[start : start + each] for start in range(0, self.num_layers, each))
