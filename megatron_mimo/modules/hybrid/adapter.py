"""Adapter of the hybrid decoder."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from megatron_mimo.modules.adapter import Axis, BuildContext, Division, Experts, FlopsContext
from megatron_mimo.modules.flops import Flops, TextWork
from megatron_mimo.modules.hybrid.config import HybridConfig
from megatron_mimo.modules.hybrid.flops import hybrid_flops, linear_widths
from megatron_mimo.modules.language.adapter import PART, LanguageAdapter

if TYPE_CHECKING:
    from megatron_mimo.modules.stage import ModuleStage

# Letter of the pattern -> fields that the ranks of such a layer divide.
_OF_LAYERS: Mapping[str, tuple[Division, ...]] = {
    "M": (
        Division("tp", PART, "mamba_num_heads"),
        Division("tp", PART, "mamba_num_groups"),
    ),
    "-": (Division("tp", PART, "ffn_hidden_size"),),
    "E": (
        Division("tp", PART, "moe_shared_expert_intermediate_size"),
        Division("ep", PART, "num_moe_experts"),
        Division("expt_tp", PART, "moe_ffn_hidden_size"),
    ),
}

# Letter of the pattern -> names of its linear layers.
_LINEAR = {
    "M": ("in_proj", "out_proj"),
    "*": ("linear_qkv", "linear_proj"),
    "-": ("linear_fc1", "linear_fc2"),
    "E": ("shared_experts.linear_fc1", "shared_experts.linear_fc2"),
}


class HybridAdapter(LanguageAdapter[HybridConfig]):
    """Decoders of Mamba-2, MoE, attention and MLP layers over megatron-core's `HybridModel`."""

    config_type = HybridConfig

    def build(self, config: HybridConfig, context: BuildContext) -> "ModuleStage":
        """This rank's shard of its pipeline stage.

        Raises:
            ValueError: The pattern does not fit the pipeline, or a size its parallel size.
        """
        from megatron_mimo.modules.hybrid.model import build_hybrid, hybrid_initial
        from megatron_mimo.modules.language.module import LanguageModule

        model = build_hybrid(
            config,
            vocab_size=context.vocab_size,
            seq_length=context.seq_length,
            pg_collection=context.pg_collection,
            params_dtype=context.params_dtype,
            sequence_parallel=context.sequence_parallel,
            execution=context.execution,
            perform_initialization=context.initialize,
        )
        initial = partial(hybrid_initial, config=config)
        return LanguageModule(config, model, initial=initial, frozen=PART in context.frozen)

    def hidden_width(self, config: HybridConfig) -> int:
        """Width of a token's embedding."""
        return config.hidden_size

    def divisions(self, config: HybridConfig) -> Iterable[Division]:
        """Attention heads and fields of the pattern's layers divide over tensor-parallel ranks."""
        yield Division("tp", PART, "num_attention_heads")
        yield Division("tp", PART, "num_query_groups", repeats=True)
        for letter, divisions in _OF_LAYERS.items():
            if letter in config.layers:
                yield from divisions

    def check_sizes(
        self, config: HybridConfig, flags: Mapping[Axis, str], sizes: Mapping[Axis, int]
    ) -> None:
        """Refuse context-parallel ranks that cannot share the heads of Mamba layers evenly.

        Raises:
            ValueError: Heads, or groups of them, do not divide.
        """
        if sizes["cp"] == 1 or "M" not in config.layers:
            return
        ranks = f"{flags['cp']} {sizes['cp']} with {flags['tp']} {sizes['tp']}"
        heads, groups = (
            number // sizes["tp"] for number in (config.mamba_num_heads, config.mamba_num_groups)
        )
        if heads % sizes["cp"]:
            raise ValueError(
                f"{ranks}: context-parallel ranks share the {heads} heads that a Mamba layer has "
                f"on each tensor-parallel rank, which do not divide by {sizes['cp']}: change one "
                f"of them, or mamba_num_heads"
            )
        if groups % sizes["cp"] and sizes["cp"] % groups:
            raise ValueError(
                f"{ranks}: context-parallel ranks share the {groups} groups of heads that a Mamba "
                f"layer has on each tensor-parallel rank: expected a multiple of {sizes['cp']}, "
                f"or a divisor of it; change one of them, or mamba_num_groups"
            )

    def check_stages(self, config: HybridConfig, number: int) -> None:
        """Refuse a number of stages that does not fit the pattern's bars.

        Raises:
            ValueError: The bars give another number of stages, or layers do not divide evenly.
        """
        config.stages(number)

    def one_stage(self, config: HybridConfig) -> HybridConfig:
        """The same layers without bars."""
        return replace(config, pattern=config.layers)

    def linear_layers(
        self, config: HybridConfig, row_width: int
    ) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """The linear layers of the pattern's layers; of E layers those of shared experts."""
        widths = linear_widths(config)
        names = [name for letter in "M*-E" if letter in config.layers for name in _LINEAR[letter]]
        return {PART: {name: widths[name] for name in names}}

    def flops(self, config: HybridConfig, work: TextWork, context: FlopsContext) -> Flops:
        """Number of operations of some work, output layer included."""
        return hybrid_flops(config, work, context)

    def experts(self, config: HybridConfig) -> Experts | None:
        """The experts of the E layers; None without such layers."""
        layers = tuple(n for n, letter in enumerate(config.layers, 1) if letter == "E")
        if not layers:
            return None
        return Experts(
            layers=layers, number=config.num_moe_experts, per_token=config.moe_router_topk
        )

    def with_even_load(self, config: HybridConfig) -> HybridConfig:
        """The config with a router that balances at random; the config itself without experts."""
        if self.experts(config) is None:
            return config
        return replace(config, moe_router_force_load_balancing=True)

    def kernels(self, config: HybridConfig) -> tuple[str, ...]:
        """Line of the start-up log on the kernel of Mamba layers."""
        from megatron_mimo.kernels.hybrid import describe_hybrid

        return (describe_hybrid(),)
