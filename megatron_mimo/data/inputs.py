"""The interface of a kind of items, such as a module's images, recordings or readings.

The data side itself processes texts only. Everything else in a sample is an *item* of a module, and
the module's `ItemInput` defines how it is processed: where its rows are in the text, how many they
are, and how the items that a rank runs are packed into one input.

A module may take items of several *kinds*, as a vision encoder takes images and videos. One kind
has the module's name, the *host*; the others name the module that they feed. Stored samples,
placeholders and questions know kinds; tokens, packed inputs and rows know modules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import numpy as np

from megatron_mimo.media.items import (
    BrokenItemError,
    ItemWords,
    Layout,
    MockItems,
    OneRunItems,
    Run,
)

__all__ = [
    "ENCODER",
    "BrokenItemError",
    "Inputs",
    "Item",
    "ItemInput",
    "ItemWords",
    "Layout",
    "MockItems",
    "OneRunItems",
    "PackedInput",
    "Run",
    "hosts",
    "module_of",
    "placeholders",
]

ENCODER = "encoder"
"""Name of the module that a run has unless it says otherwise."""


class Item(Protocol):
    """One encoded item: a dataclass with further fields that its input's `pack` uses.

    Items may come from a reader process, so they must be picklable; arrays pickle without a copy.
    """

    @property
    def rows(self) -> int:
        """Number of rows (embedding vectors) of the item, with its content or without."""
        ...


class PackedInput(Protocol):
    """The items that one rank runs in a microbatch, as input of its module.

    A frozen dataclass of tensors, numbers, texts and tuples of these: it is sent between ranks, and
    its tensors are copied to the device, ahead of their use.
    """

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the module processes; the sum of the lengths."""
        ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each segment; attention stays inside a segment."""
        ...


class ItemInput(Protocol):
    """A kind of items: from stored sources to packed inputs.

    A source is whatever a stored sample holds: the bytes of a file, or an array.
    """

    @property
    def words(self) -> ItemWords:
        """Names of the items in messages and stored samples."""
        ...

    @property
    def feeds(self) -> str | None:
        """Name of the module that takes the items; None for the module of the kind's own name.

        Items that feed the module of another kind are written out before anything else: `runs`
        says how. That kind, the host, packs the items of both.
        """
        ...

    @property
    def placeholder(self) -> str:
        """Text that stands for an item in stored samples and in questions."""
        ...

    @property
    def token(self) -> str:
        """Token of the vocabulary that rows replace."""
        ...

    @property
    def inline(self) -> str:
        """Text of an item where no chat template writes it; it has the token once."""
        ...

    @property
    def part(self) -> str | None:
        """Type of an item among the parts of a message, where chat templates write the item.

        They are then given messages whose contents are lists of texts and of {"type": TYPE}. None:
        the item's inline text is in the message's.
        """
        ...

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that layouts may have; each is one token of the vocabulary."""
        ...

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of the files of items in stored samples, in lower case."""
        ...

    @property
    def item_type(self) -> type[Any]:
        """Type of the result of `encode`: a dataclass whose fields `pack` all knows."""
        ...

    @property
    def packed_type(self) -> type[Any]:
        """Type of the result of `pack`: a frozen dataclass, which ranks that receive data build."""
        ...

    def among(self, count: int) -> "ItemInput":
        """The kind of the items of a sample that has this many of them."""
        ...

    def layout(self, item: Any) -> Layout:
        """How an item, with its content or without, is written: marks, and numbers of rows.

        The numbers add up to the item's rows; each is that of rows that follow each other. Not
        used for an item that feeds the module of another kind.
        """
        ...

    def runs(self, item: Any) -> tuple[Run, ...]:
        """An item, with its content or without, as texts that each end with a placeholder.

        The placeholder is the host's; a layout says what becomes of it.
        """
        ...

    def lengths(self, item: Any) -> tuple[int, ...]:
        """Number of tokens of each segment that the module processes for an item.

        They are known without its content, and are those of `PackedInput.lengths`: ranks share out
        items by what they cost, before any of them has the content.
        """
        ...

    def facts(self, item: Any) -> Mapping[str, Sequence[int]]:
        """Integers of an item that the target needs beside its rows, by name.

        They are known without its content. All items of a kind have the same names, and other kinds
        have others.
        """
        ...

    def examine(self, source: Any) -> Any:
        """The shape of an item that appears complete, from its header only.

        It determines the number of rows and must not depend on whether content is read: every
        reader of a lane calls this first.

        Raises:
            BrokenItemError: The item is damaged; its sample is skipped.
        """
        ...

    def encode(self, source: Any, shape: Any, *, with_content: bool) -> tuple[Item, str | None]:
        """Encode an item.

        Args:
            source: Item as it is stored.
            shape: Shape of the item, from `examine`.
            with_content: Whether this rank runs the item; otherwise only its shape is computed.

        Returns:
            The item, and the reason if a blank of its shape replaces it: content that cannot be
            decoded must not change the number of rows that its header determines.
        """
        ...

    def pack(self, items: Sequence[Any], seeds: Sequence[int]) -> PackedInput | None:
        """Pack items one after the other; None for no item.

        Args:
            items: Items with content, in manifest order.
            seeds: Seed of each item's augmentation, which differs in each step.
        """
        ...

    def without_augmentation(self) -> "ItemInput":
        """The same settings without augmentation, as evaluation reads."""
        ...

    def mock(self, rng: np.random.Generator, room: int) -> MockItems | None:
        """Mock items with a question and its answer; None for a sample without items.

        Args:
            rng: Random generator of all choices, so that a sample is always the same.
            room: Number of positions that the items, their tags and the texts may take.
        """
        ...

    def check_mock(self, room: int) -> None:
        """Refuse settings with which `mock` cannot make items.

        Raises:
            ValueError: The settings contradict each other, or the items do not fit.
        """
        ...


Inputs = Mapping[str, ItemInput]
"""The kinds of items of a run by name; a host has the name of the module that takes its items."""


def check_inputs(inputs: Inputs) -> None:
    """Refuse kinds of items that lack a member of `ItemInput`, or whose packed input cannot travel.

    Raises:
        ValueError: A member is missing, or the packed type is no plain dataclass; the message names
            the module and what is wrong.
    """
    members = [name for name in vars(ItemInput) if not name.startswith("_")]
    own = [name for name, kind in inputs.items() if getattr(kind, "feeds", None) is None]
    for module, kind in inputs.items():
        missing = [name for name in members if not hasattr(kind, name)]
        if missing:
            raise ValueError(
                f"items of module {module}: {type(kind).__name__} has no {', '.join(missing)}: "
                f"expected every member of megatron_mimo.data.ItemInput; OneRunItems has those "
                f"that most kinds share"
            )
        if kind.feeds is not None and kind.feeds not in own:
            raise ValueError(
                f"items of kind {module} feed the module {kind.feeds!r}, which has no items of its "
                f"own: expected one of {', '.join(own)}"
            )
        if not is_plain(kind.packed_type):
            raise ValueError(
                f"items of module {module}: packed input {kind.packed_type.__name__} cannot "
                f"travel: {PLAIN}"
            )


PLAIN = "expected a frozen dataclass whose fields are all arguments of its constructor"


def is_plain(kind: type[Any]) -> bool:
    """Whether ranks can rebuild values of a type from their fields alone."""
    frozen = is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return frozen and all(field.init for field in fields(kind))


def module_of(name: str, inputs: Inputs) -> str:
    """Name of the module that takes the items of a kind."""
    return inputs[name].feeds or name


def hosts(inputs: Inputs) -> Inputs:
    """The kinds that have the name of the module that takes their items: one for each module."""
    if all(kind.feeds is None for kind in inputs.values()):
        return inputs
    return {name: kind for name, kind in inputs.items() if kind.feeds is None}


def placeholders(inputs: Inputs) -> dict[str, str]:
    """Module -> the token of the vocabulary that its rows replace."""
    return {module: kind.token for module, kind in hosts(inputs).items()}
