"""What every kind of item shares: its names in messages, damage, mock items, and defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

Layout = tuple[str | int, ...]
"""An item among the tokens: texts of one token each, and numbers of rows that follow each other."""

Run = tuple[str, Layout]
"""A text, and what follows it among the tokens."""


class BrokenItemError(Exception):
    """The file of an item is damaged, or not of its kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemWords:
    """Names of a kind of items in messages and stored samples, and its flags.

    Attributes:
        noun: Name of one item: "image". A stored sample names its files in the field `image`, or
            `images` for several.
        article: Indefinite article of the noun.
        placeholder: Flag that chooses the placeholder: "--image-token".
        tags: Flag and value that chose the tags: "--image-tag-type internvl".
        smaller: Advice for fewer rows per item: "lower --dynamic-resolution-max-patches".
    """

    noun: str
    article: str = "a"
    placeholder: str = "placeholder"
    tags: str = "its tags"
    smaller: str = "make its items smaller"

    @property
    def plural(self) -> str:
        """Name of several items."""
        return f"{self.noun}s"

    @property
    def one(self) -> str:
        """The noun with its article."""
        return f"{self.article} {self.noun}"


@dataclass(frozen=True, kw_only=True, slots=True)
class MockItems:
    """Mock items of one sample, with a question and its answer.

    Attributes:
        sources: Items as a stored sample would hold them; at least one.
        question: Text with a placeholder for each item.
        answer: Text to learn; not empty.
    """

    sources: tuple[Any, ...]
    question: str
    answer: str


class OneRunItems:
    """Defaults for kinds whose items are one run of rows, with a tag before and after it.

    A kind that inherits them says no more of its texts than `placeholder`, which is a token of the
    vocabulary too, and `tags`.
    """

    __slots__ = ()

    placeholder: Any
    """Text that stands for an item in stored samples."""

    @property
    def tags(self) -> tuple[str, str]:
        """Texts that are written before and after an item; none by default."""
        return ("", "")

    @property
    def token(self) -> str:
        """Token of the vocabulary that rows replace: the placeholder."""
        token: str = self.placeholder
        return token

    @property
    def inline(self) -> str:
        """Text of an item where no chat template writes it: the placeholder."""
        return self.token

    @property
    def part(self) -> str | None:
        """None: chat templates do not write the item, its placeholder is in the text."""
        return None

    @property
    def feeds(self) -> str | None:
        """None: the items are those of the module of the kind's own name."""
        return None

    def runs(self, item: Any) -> tuple[Run, ...]:
        """One run, without a text before it."""
        return (("", self.layout(item)),)

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that layouts may have: the tags."""
        return tuple(tag for tag in self.tags if tag)

    def layout(self, item: Any) -> Layout:
        """The tags, and all rows between them."""
        before, after = self.tags
        return tuple(piece for piece in (before, item.rows, after) if piece)

    def lengths(self, item: Any) -> tuple[int, ...]:
        """One segment, with a token for each row."""
        return (item.rows,)

    def facts(self, item: Any) -> Mapping[str, Sequence[int]]:
        """Nothing: the target needs only the rows."""
        return {}

    def among(self, count: int) -> Self:
        """The same: a sample's other items do not change an item."""
        return self
