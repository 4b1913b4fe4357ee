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


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridConfig:
    """Architecture of a decoder of Mamba-2, MoE, attention and MLP layers (Nemotron-H).

    Attributes:
        pattern: A letter for each layer: M Mamba-2, E experts, * attention, - MLP. Bars between
            pipeline stages; without, stages get equal numbers of layers.
        hidden_size: H, width of a token's embedding.
        num_attention_heads: Attention heads.
        num_query_groups: Key-value heads.
        kv_channels: Width of an attention head.
        ffn_hidden_size: Width inside an MLP layer.
        mamba_num_heads: Heads of a Mamba layer.
        mamba_head_dim: Width of such a head.
        mamba_num_groups: Groups of those heads that share B and C.
        mamba_state_dim: Size of a head's state.
        mamba_step_floor: Least step of a Mamba layer; transformers has one, Megatron 0.
        num_moe_experts: Experts of an E layer.
        moe_router_topk: Experts that a token goes to.
        moe_ffn_hidden_size: Width inside an expert.
        moe_shared_expert_intermediate_size: Width inside the expert that every token goes to.
        moe_router_topk_scaling_factor: Multiplies the weights of the chosen experts.
        moe_aux_loss_coeff: Weight of the load-balancing loss of each sequence.
        moe_router_bias_update_rate: Step of the bias that evens out the experts' load.
        moe_router_force_load_balancing: Send tokens to experts at random, evenly; for benchmarks.
        layernorm_epsilon: Of every RMSNorm.
        init_method_std: Standard deviation of the initial weights.
        share_embeddings_and_output_weights: Tie the output layer to the word embeddings.
    """

    pattern: str = "M-M*"
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_query_groups: int = 2
    kv_channels: int = 32
    ffn_hidden_size: int = 512
    mamba_num_heads: int = 8
    mamba_head_dim: int = 32
    mamba_num_groups: int = 2
    mamba_state_dim: int = 32
    mamba_step_floor: float = 0.0
    num_moe_experts: int = 8
    moe_router_topk: int = 2
    moe_ffn_hidden_size: int = 128
    moe_shared_expert_intermediate_size: int = 256
    moe_router_topk_scaling_factor: float = 1.0
    moe_aux_loss_coeff: float = 1e-4
    moe_router_bias_update_rate: float = 1e-3
    moe_router_force_load_balancing: bool = False
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    share_embeddings_and_output_weights: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.pattern) - set("ME*-|"))
        if unknown or not self.layers:
            raise ValueError(
                f"pattern {self.pattern!r}: expected letters M, E, * and -, one for each layer, "
                f"and | between pipeline stages"
            )

    @property
    def layers(self) -> str:
        """The letters alone."""
        return self.pattern.replace("|", "")

    @property
    def num_layers(self) -> int:
        """Layers in all."""
        return len(self.layers)

    def stages(self, number: int) -> tuple[str, ...]:
        """The letters of each pipeline stage.

        Raises:
            ValueError: Bars make another number of stages, or layers do not divide evenly.
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


LanguageConfig = GptConfig | HybridConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionConfig:
    """How a language model is computed; none of it changes what comes out.

    Attributes:
        recompute_granularity: "full" recomputes each layer in backward from its input,
            "selective" parts of layers; None keeps all activations.
        recompute_modules: The parts, for "selective".
        moe_grouped_gemm: One grouped product for all experts of a rank; None: where there is one.
    """

    recompute_granularity: str | None = None
    recompute_modules: tuple[str, ...] = ()
    moe_grouped_gemm: bool | None = None
