"""Adapter of the dense decoder."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from megatron_mimo.modules.adapter import BuildContext, Division, FlopsContext
from megatron_mimo.modules.flops import Flops, TextWork
from megatron_mimo.modules.gpt.config import GptConfig
from megatron_mimo.modules.gpt.flops import attention_outputs, gpt_flops
from megatron_mimo.modules.language.adapter import PART, LanguageAdapter

if TYPE_CHECKING:
    from megatron_mimo.modules.stage import ModuleStage
    from megatron_mimo.weights.initial import Draw


class GptAdapter(LanguageAdapter[GptConfig]):
    """Dense decoders over megatron-core's `GPTModel`."""

    config_type = GptConfig

    def build(self, config: GptConfig, context: BuildContext) -> "ModuleStage":
        """This rank's shard of its pipeline stage.

        Raises:
            ValueError: The vocabulary does not divide by the tensor-parallel size.
        """
        from megatron_mimo.modules.gpt.model import build_gpt
        from megatron_mimo.modules.initial import transformer_initial
        from megatron_mimo.modules.language.module import LanguageModule

        model = build_gpt(
            config,
            vocab_size=context.vocab_size,
            seq_length=context.seq_length,
            pg_collection=context.pg_collection,
            params_dtype=context.params_dtype,
            sequence_parallel=context.sequence_parallel,
            execution=context.execution,
            initialize=context.initialize,
        )

        def initial(name: str) -> "Draw | None":
            return transformer_initial(name, config.init_method_std, config.num_layers)

        return LanguageModule(config, model, initial=initial, frozen=PART in context.frozen)

    def hidden_width(self, config: GptConfig) -> int:
        """Width of a token's embedding."""
        return config.hidden_size

    def divisions(self, config: GptConfig) -> Iterable[Division]:
        """Layers divide over stages; heads and the MLP over tensor-parallel ranks."""
        return (
            Division("tp", PART, "num_attention_heads"),
            Division("tp", PART, "num_query_groups", repeats=True),
            Division("pp", PART, "num_layers"),
            Division("tp", PART, "ffn_hidden_size"),
        )

    def linear_layers(
        self, config: GptConfig, row_width: int
    ) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """The linear layers of attention and MLPs."""
        width, inner = config.hidden_size, config.ffn_hidden_size
        return {
            PART: {
                "linear_qkv": (width, attention_outputs(config)),
                "linear_proj": (width, width),
                "linear_fc1": (width, inner),
                "linear_fc2": (inner, width),
            }
        }

    def flops(self, config: GptConfig, work: TextWork, context: FlopsContext) -> Flops:
        """Number of operations of some work, output layer included."""
        return gpt_flops(config, work, context)

    def with_even_load(self, config: GptConfig) -> GptConfig:
        """The config itself: there are no experts."""
        return config
