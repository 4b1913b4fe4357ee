"""Settings of the computation of language models of every family."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionConfig:
    """How a language model is computed; no setting changes the result.

    Attributes:
        recompute_granularity: Extent of recomputation in backward: "full" recomputes each layer
            from its input, "selective" recomputes parts of layers; None keeps all activations.
        recompute_modules: Names of the parts to recompute, for "selective".
        moe_grouped_gemm: Whether all experts of a rank are computed in one grouped product; None:
            only where such a kernel is present.
    """

    recompute_granularity: str | None = None
    recompute_modules: tuple[str, ...] = ()
    moe_grouped_gemm: bool | None = None
