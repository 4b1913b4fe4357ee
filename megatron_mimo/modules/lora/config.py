"""Flags of LoRA, and what follows from them."""

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from megatron_mimo.settings import (
    AtLeast,
    Folder,
    MoreThan,
    Number,
    OnlyWith,
    Real,
    Switch,
    Within,
    named,
)
from megatron_mimo.settings.ranges import MOST_WIDTH

_LORA = OnlyWith("--lora-rank")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Adapters that train in place of the weights of linear layers.

    Attributes:
        rank: Rank of the product that is added to each weight; left out: no adapters.
        alpha: Number that, over the rank, scales the product, as in peft; left out: the rank.
        dropout: Share of an adapter's inputs that are zeroed in training.
        rslora: Whether --lora-alpha is taken over the root of the rank in place of the rank.
        targets: Part whose linear layers get adapters, or one of its layers, as in
            language.linear_qkv; the other weights of the part do not train; left out: language.
        load: Folder of adapters, as peft writes it, to begin with; a checkpoint of --load replaces
            them.
    """

    rank: Annotated[Number, named("--lora-rank"), Within(1, MOST_WIDTH)] = None
    alpha: Annotated[Real, named("--lora-alpha"), MoreThan(0, 1e6), _LORA] = None
    dropout: Annotated[float, named("--lora-dropout"), AtLeast(0, below=1), _LORA] = 0.0
    rslora: Annotated[Switch, named("--lora-rslora"), _LORA] = False
    targets: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(name="lora-targets", metavar="PART[.LAYER]"),
        _LORA,
    ] = ()
    load: Annotated[Folder, named("--load-lora"), _LORA] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """The adapters of a model.

    Attributes:
        rank: Rank of each product.
        alpha: Number that, over the rank or its root, scales each product.
        dropout: Share of an adapter's inputs that are zeroed in training.
        rslora: Whether it is the root.
        targets: Part of the model -> names of its layers that have adapters.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    targets: Mapping[str, frozenset[str]]

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def describe(self, parts: Iterable[str], frozen: Set[str]) -> str:
        """One line on what trains.

        Args:
            parts: Names of the parts of the model.
            frozen: Names of the parts that do not train.
        """
        trains = [f"{part} ({', '.join(sorted(of))})" for part, of in self.targets.items()]
        whole = [part for part in parts if part not in frozen and part not in self.targets]
        return (
            f"adapters of rank {self.rank}, scale {self.scale:g}: {'; '.join(trains)} | trained "
            f"whole: {', '.join(whole) or 'none'}"
        )


def layer_name(path: str) -> str | None:
    """The name by which a layer is chosen; None for what is never adapted: experts of a router."""
    *parents, last = path.split(".")
    if "shared_experts" in parents:
        return f"shared_experts.{last}"
    return None if "experts" in parents else last
