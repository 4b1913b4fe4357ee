"""Exact counts of floating-point operations of a training step: the part common to all families.

Conventions:

- A multiply-add is two operations. Matrix products count and nothing else does, as in torch's
  `FlopCounterMode` and in the counts that papers report: norms, activations, softmax, the
  width-4 convolution of a Mamba layer and the interpolation of position embeddings do not.
- Backward is, of each product, the gradient of its weight and that of its input, as many operations
  as forward each. A frozen weight has no gradient; where nothing below trains, the input has none.
  What is computed twice to save memory (recomputation, the scores inside fused attention) counts
  once: these are model FLOPs, as in Chowdhery et al. 2022, "PaLM", appendix B.
- Attention counts pairs of positions of one segment (document, image). A causal mask hides all but
  n (n + 1) / 2 of n^2 pairs: `causal_pairs` counts those that are visible, or all, as torch's
  counter does, which does not look at masks.
- A Mamba layer is the chunked scan of Dao and Gu 2024, "Transformers are SSMs", section 6. Inside a
  chunk all pairs count, for whole chunks are multiplied.

The counts are of a whole module, whatever its layout: work that tensor-parallel ranks do in copies
counts once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import ClassVar, Self


@dataclass(frozen=True, slots=True)
class Flops:
    """Numbers of operations of a forward and of its backward; they can be added.

    Attributes:
        forward: Number of operations of the forward.
        backward: Number of operations of the backward.
    """

    forward: int = 0
    backward: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.forward * times, self.backward * times)

    @property
    def total(self) -> int:
        """Number of operations of forward and backward together."""
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Amount of work of a module; work of microbatches, lanes and ranks adds up.

    Each family derives its own type. All fields are whole numbers, 0 by default.

    Attributes:
        balanced: Names of the counts whose balance over a source's ranks is reported.
        rows: Number of rows that a source produces for the language model.
    """

    balanced: ClassVar[tuple[str, ...]] = ("rows",)

    rows: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in fields(self)
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TextWork(Work):
    """Amount of work of a language model.

    Attributes:
        sequences: Number of sequences.
        document_pairs: Number of pairs of positions of one document, over all sequences
            (`causal_pairs`); without packing a sequence is one document.
    """

    sequences: int = 0
    document_pairs: int = 0


def all_pairs(lengths: Iterable[int]) -> int:
    """Number of pairs of positions inside segments, pairs of a position with itself included."""
    return sum(length * length for length in lengths)


def causal_pairs(lengths: Iterable[int], *, masked: bool = False) -> int:
    """Number of pairs whose later position sees the earlier under a causal mask.

    Args:
        lengths: Lengths of the segments; padding that is a separate segment counts if it is
            given.
        masked: Whether to count the pairs that the mask hides too.
    """
    lengths = tuple(lengths)
    return all_pairs(lengths) if masked else (all_pairs(lengths) + sum(lengths)) // 2


def text_work(documents: Iterable[int], *, sequences: int = 1, masked: bool = False) -> TextWork:
    """Work of a language model on sequences, from the lengths of their documents in tokens."""
    return TextWork(sequences=sequences, document_pairs=causal_pairs(documents, masked=masked))


def product(rows: int, inner: int, outer: int, *, weight: bool, inputs: bool) -> Flops:
    """Number of operations of [rows, inner] @ [inner, outer].

    Args:
        rows: Number of rows.
        inner: Width of an input row.
        outer: Width of an output row.
        weight: Whether backward computes the weight's gradient.
        inputs: Whether backward computes the rows' gradient.
    """
    forward = 2 * rows * inner * outer
    return Flops(forward, forward * (weight + inputs))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraLayers:
    """Adapters of low rank that train in place of the weights of a part.

    Attributes:
        rank: Rank of each.
        layers: Names of the layers that have one.
    """

    rank: int
    layers: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """Counts operations of linear layers, with those of their adapters.

    Attributes:
        weight: Whether backward computes gradients of the layers' own weights.
        inputs: Whether backward computes gradients of their inputs.
        lora: Adapters that train in place of the weights; None without any.
    """

    weight: bool
    inputs: bool
    lora: LoraLayers | None = None

    def __call__(self, name: str, rows: int, inner: int, outer: int, *, parts: int = 1) -> Flops:
        """Number of operations of a layer on so many rows.

        Args:
            name: Name of the layer.
            rows: Number of rows.
            inner: Width of an input row.
            outer: Width of an output row.
            parts: Number of layers of other programs that it is, each with an adapter.
        """
        flops = product(rows, inner, outer, weight=self.weight, inputs=self.inputs)
        if self.lora is None or name not in self.lora.layers:
            return flops
        rank = self.lora.rank
        flops += product(rows, inner, parts * rank, weight=True, inputs=self.inputs)
        # Of each output, the product with its own part.
        return flops + product(rows, rank, outer, weight=True, inputs=True)


def attention(pairs: int, width: int, *, backward: bool) -> Flops:
    """Number of operations of scores and of weighted values; backward has both gradients.

    Args:
        pairs: Number of pairs of positions.
        width: Sum of the widths of all heads.
        backward: Whether there is a backward.
    """
    forward = 2 * 2 * pairs * width
    return Flops(forward, 2 * forward * backward)
