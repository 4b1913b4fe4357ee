"""Types of flags, and marks with the rules for a flag beside its type.

A mark is a part of the annotation of a field, as in `lr: Annotated[float, Within(0, 10)] = 1e-4`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from tyro.conf import DisallowNone, Fixed, FlagCreatePairsOff, Suppress, arg

T = TypeVar("T")

# A switch that is off unless named; without a --no- form.
Switch = FlagCreatePairsOff[bool]
# These may be left out; their documentation says what holds then.
Choice = Annotated[DisallowNone[bool | None], arg(help_behavior_hint="")]
Number = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
Real = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]
Folder = Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")]
File = Annotated[str | None, arg(metavar="PATH", help_behavior_hint="")]
Name = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
# The config of a part, whose fields are flags of the section around it.
Part = Annotated[T, arg(name="")]
# A setting that is not a flag, because it follows from flags of several parts.
Derived = Annotated[T, Fixed, Suppress]


def named(flag: str) -> Any:
    """The name of a flag whose field has a shorter one, because its part says the rest.

    Args:
        flag: The name as it is typed, as in "--adam-beta1".
    """
    return arg(name=_name(flag))


class Bound(ABC):
    """The numbers that a field accepts: a range with two finite ends.

    A bound without an upper end would accept infinity, and sizes that nothing can hold.
    """

    @property
    @abstractmethod
    def ends(self) -> tuple[float, float]:
        """The two ends of the range, each of which may be outside of it."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """The expected numbers in words, for error messages."""

    @abstractmethod
    def admits(self, value: float) -> bool:
        """Whether a number is accepted; nan never is."""


@dataclass(frozen=True, slots=True)
class Within(Bound):
    """The number is between two others, or one of them.

    Attributes:
        lowest: Smallest number that is accepted.
        highest: Largest number that is accepted.
    """

    lowest: float
    highest: float

    @property
    def ends(self) -> tuple[float, float]:
        """The two ends of the range."""
        return self.lowest, self.highest

    @property
    def expected(self) -> str:
        """The expected numbers in words, for error messages."""
        return f"{_words(self.lowest)} to {_words(self.highest)}"

    def admits(self, value: float) -> bool:
        """Whether a number is accepted; nan never is."""
        return self.lowest <= value <= self.highest


@dataclass(frozen=True, slots=True)
class AtLeast(Bound):
    """The number is `lowest` or more, and less than `below`.

    Attributes:
        lowest: Smallest number that is accepted.
        below: Smallest number that is too large.
    """

    lowest: float
    below: float

    @property
    def ends(self) -> tuple[float, float]:
        """The two ends of the range."""
        return self.lowest, self.below

    @property
    def expected(self) -> str:
        """The expected numbers in words, for error messages."""
        return f"{_words(self.lowest)} or more, and below {_words(self.below)}"

    def admits(self, value: float) -> bool:
        """Whether a number is accepted; nan never is."""
        return self.lowest <= value < self.below


@dataclass(frozen=True, slots=True)
class MoreThan(Bound):
    """The number is more than `bound`, and at most `highest`.

    Attributes:
        bound: Largest number that is too small.
        highest: Largest number that is accepted.
    """

    bound: float
    highest: float

    @property
    def ends(self) -> tuple[float, float]:
        """The two ends of the range."""
        return self.bound, self.highest

    @property
    def expected(self) -> str:
        """The expected numbers in words, for error messages."""
        return f"more than {_words(self.bound)}, and at most {_words(self.highest)}"

    def admits(self, value: float) -> bool:
        """Whether a number is accepted; nan never is."""
        return self.bound < value <= self.highest


class OnlyWith:
    """The flag has an effect only together with one of some others; alone it is refused.

    Args:
        flags: Other flags as they are typed, "--save" or "--lr-decay-style WSD".
    """

    __slots__ = ("flags",)

    def __init__(self, *flags: str) -> None:
        self.flags = tuple(f"--{_name(flag)}" for flag in flags)

    def is_met(self, found: Mapping[str, Any]) -> bool:
        """Whether one of the others is given, with its value if `flags` has one.

        Args:
            found: Values of all flags by their names.
        """
        return any(_is_given(typed, found) for typed in self.flags)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OnlyWith) and self.flags == other.flags

    def __hash__(self) -> int:
        return hash(self.flags)


class InsteadOf:
    """The flag is an alternative to others: at most one of them is given.

    A choice on the command line replaces one in a file, and a later file's replaces an earlier's.

    Args:
        flags: Other flags as they are typed, "--train-iters".
    """

    __slots__ = ("names",)

    def __init__(self, *flags: str) -> None:
        self.names = frozenset(map(_name, flags))


def is_on(value: Any) -> bool:
    """Whether a flag has a value; a switch that is off has none."""
    return value is not None and value is not False


def _words(number: float) -> str:
    """A number with its thousands apart, so that a large one can be read."""
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def _is_given(typed: str, found: Mapping[str, Any]) -> bool:
    name, _, wanted = _name(typed).partition(" ")
    return str(found[name]) == wanted if wanted else is_on(found[name])


def _name(flag: str) -> str:
    if not flag.startswith("--"):
        raise ValueError(f"{flag!r}: expected a flag as it is typed, which starts with --")
    return flag.removeprefix("--")
