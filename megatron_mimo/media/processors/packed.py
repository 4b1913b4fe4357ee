"""Images as transformers' vision towers take them: one by one, and packed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """What the size of an image decides.

    Attributes:
        size: Width and height of the image in pixels.
        num_tokens: Number of tokens of the image in the vision tower.
        lines: Number of rows of each line; lines are written with a text between them.
        facts: What the language model takes of the image beside its rows: name of the argument of
            transformers' forward -> numbers.
    """

    size: tuple[int, int]
    num_tokens: int
    lines: tuple[int, ...]
    facts: Mapping[str, tuple[int, ...]]

    @property
    def rows(self) -> int:
        """Number of rows of the image."""
        return sum(self.lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessedImage:
    """One image.

    Attributes:
        outline: What its size decides.
        shares_sample: Whether it was made as one of several images of a sample.
        content: Argument of the model's `get_image_features` -> array of this image alone, without
            padding; None where the pixels are not needed.
    """

    outline: Outline
    shares_sample: bool
    content: Mapping[str, NDArray[Any]] | None

    @property
    def rows(self) -> int:
        """Number of rows of the image."""
        return self.outline.rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessedImages:
    """Images that one rank runs in a microbatch: the arguments of `get_image_features`.

    Attributes:
        names: Names of the arguments.
        tensors: Their values, as the folder's processor makes them of several images.
        lengths: Number of tokens of each image in the vision tower, in manifest order.
        rows: Number of rows of each image, in manifest order.
        places: Index among the images of `tensors` of each image of the manifest. They differ where
            a tower takes images of another kind after all others.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the vision tower."""
        return sum(self.lengths)


@dataclass(frozen=True, kw_only=True, slots=True)
class Argument:
    """An argument of `get_image_features`, and how those of several images become one.

    Attributes:
        name: Its name.
        join: "follow": end to end, [n_1 + n_2, ...]. "stack": a new first dimension, [N, ...].
            "pad": the same after each dimension was filled up to the largest.
        filling: Number that fills up.
        is_filled: Whether the processor itself fills it up to a fixed number of tokens.
    """

    name: str
    join: Literal["follow", "stack", "pad"]
    filling: int = 0
    is_filled: bool = False

    def take(self, made: Mapping[str, Any], outline: Outline) -> NDArray[Any]:
        """The value of the first image among those that the processor has made."""
        value: NDArray[Any] = np.asarray(made[self.name])
        if self.join != "follow":
            value = value[0]
        return value[: outline.num_tokens].copy() if self.is_filled else value

    def merge(self, values: Sequence[NDArray[Any]]) -> Tensor:
        """One tensor of the values of several images: [n_1 + n_2, ...] or [N, ...]."""
        if self.join == "follow":
            return torch.from_numpy(np.concatenate(values))
        if self.join == "stack":
            return torch.from_numpy(np.stack(values))
        most = np.max([value.shape for value in values], axis=0).tolist()
        merged = np.full((len(values), *most), self.filling, dtype=values[0].dtype)
        for into, value in zip(merged, values, strict=True):
            into[tuple(slice(side) for side in value.shape)] = value
        return torch.from_numpy(merged)
