"""Types shared by every kind of item: its names in messages, damage, and mock items."""

from dataclasses import dataclass
from typing import Any


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
