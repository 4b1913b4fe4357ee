"""Distributions that initial weights are drawn from."""

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Generator, Tensor


class Draw(Protocol):
    """A distribution that fills a float32 tensor from a generator."""

    def fill(self, tensor: Tensor, generator: Generator) -> None:
        """Overwrite `tensor`, float32 [...], with numbers drawn from the generator."""
        ...


@dataclass(frozen=True, slots=True)
class Normal:
    """Normal distribution around zero.

    Attributes:
        std: Standard deviation.
    """

    std: float

    def fill(self, tensor: Tensor, generator: Generator) -> None:
        """Overwrite `tensor`, float32 [...], with numbers drawn from the generator."""
        tensor.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Uniform distribution between two bounds.

    Attributes:
        low: Smallest value.
        high: Largest value.
    """

    low: float
    high: float

    def fill(self, tensor: Tensor, generator: Generator) -> None:
        """Overwrite `tensor`, float32 [...], with numbers drawn from the generator."""
        tensor.uniform_(self.low, self.high, generator=generator)


@dataclass(frozen=True, slots=True)
class LogOfUniform:
    """Logarithms of numbers that are uniform between two bounds, as Mamba's decay rates.

    Attributes:
        low: Smallest number, positive.
        high: Largest number.
    """

    low: float
    high: float

    def fill(self, tensor: Tensor, generator: Generator) -> None:
        """Overwrite `tensor`, float32 [...], with numbers drawn from the generator."""
        tensor.uniform_(self.low, self.high, generator=generator).log_()


@dataclass(frozen=True, slots=True)
class StepBias:
    """Inverse of softplus of steps that are log-uniform between two bounds, as Mamba's step biases.

    Attributes:
        low: Smallest step, positive.
        high: Largest step.
    """

    low: float
    high: float

    def fill(self, tensor: Tensor, generator: Generator) -> None:
        """Overwrite `tensor`, float32 [...], with numbers drawn from the generator."""
        tensor.uniform_(math.log(self.low), math.log(self.high), generator=generator).exp_()
        # Inverse of softplus.
        tensor.copy_(tensor + (-(-tensor).expm1()).log())
