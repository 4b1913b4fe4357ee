"""Distributions that initial weights are drawn from."""

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Generator, Tensor


class Draw(Protocol):
    """Fills a float32 tensor from a generator."""

    def fill(self, tensor: Tensor, generator: Generator) -> None:
        """Overwrite `tensor`."""
        ...


@dataclass(frozen=True, slots=True)
class Normal:
    """Around zero.

    Attributes:
        std: Standard deviation.
    """

    std: float

    def fill(self, tensor: Tensor, generator: Generator) -> None:
        """Overwrite `tensor`."""
        tensor.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Evenly between two bounds.

    Attributes:
        low: Least value.
        high: Largest value.
    """

    low: float
    high: float

    def fill(self, tensor: Tensor, generator: Generator) -> None:
        """Overwrite `tensor`."""
        tensor.uniform_(self.low, self.high, generator=generator)


@dataclass(frozen=True, slots=True)
class LogOfUniform:
    """Logarithms of numbers evenly between two bounds, as Mamba's decay rates.

    Attributes:
        low: Least number, positive.
        high: Largest number.
    """

    low: float
    high: float

    def fill(self, tensor: Tensor, generator: Generator) -> None:
        """Overwrite `tensor`."""
        tensor.uniform_(self.low, self.high, generator=generator).log_()


@dataclass(frozen=True, slots=True)
class StepBias:
    """What softplus turns into steps evenly spread by magnitude, as Mamba's step biases.

    Attributes:
        low: Least step, positive.
        high: Largest step.
    """

    low: float
    high: float

    def fill(self, tensor: Tensor, generator: Generator) -> None:
        """Overwrite `tensor`."""
        tensor.uniform_(math.log(self.low), math.log(self.high), generator=generator).exp_()
        # Inverse of softplus.
        tensor.copy_(tensor + (-(-tensor).expm1()).log())
