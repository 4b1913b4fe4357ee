"""The language model of an architecture, whichever it is."""

from typing import Any

from megatron_mimo.language.config import HybridConfig, LanguageConfig
from megatron_mimo.language.gpt import build_gpt
from megatron_mimo.language.hybrid import build_hybrid


def build_language(config: LanguageConfig, **build: Any) -> Any:
    """Build this rank's shard of its pipeline stage; megatron-core's `GPTModel` or `HybridModel`.

    Args:
        config: The architecture.
        build: As `build_gpt` and `build_hybrid` take it.

    Raises:
        ValueError: A size does not fit its parallel size.
    """
    if isinstance(config, HybridConfig):
        return build_hybrid(config, **build)
    return build_gpt(config, **build)
