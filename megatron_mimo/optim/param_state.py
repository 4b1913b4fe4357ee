"""The part of one weight's optimizer state that a rank owns."""

from dataclasses import dataclass

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class ParamState:
    """The part of one weight's state that this data-parallel rank owns.

    Attributes:
        start: Index of the first element that it owns, in the flattened local weight.
        stop: Index after the last element that it owns.
        tensors: Tensors in the optimizer's own memory: "fp32_param", "exp_avg" and "exp_avg_sq" ->
            float32 [stop - start].
    """

    start: int
    stop: int
    tensors: dict[str, Tensor]
