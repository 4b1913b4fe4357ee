"""Questions about a picture, a call and a video: one, two or all three of them are needed."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np

from megatron_mimo.data.samples.omni.motion import DIRECTIONS, OPPOSITE, Direction
from megatron_mimo.settings import Within, check_bounds
from megatron_mimo.settings.ranges import MOST_SEED

Split = Literal["train", "val"]
Medium = Literal["image", "audio", "video"]
Kind = Literal["shown", "dialled", "moves", "mover", "same", "follow", "all"]

_LONGEST_NUMBER = 2
_SHOWN, _DIALLED, _MOVES = (
    "Which digit is shown?",
    "Which number was dialled?",
    "Where does it move?",
)
_DIRECTIONS: tuple[Direction, ...] = tuple(DIRECTIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class OmniDigitsConfig:
    """Settings of the dataset to write.

    Attributes:
        num_train: Number of samples of the train split.
        num_val: Number of samples of the val split; kinds of questions take turns in it.
        val_fraction: Fraction of the handwritten digits that is held out, 0 to 1.
        seed: Seed of the split and of all random choices.
    """

    num_train: Annotated[int, Within(1, 10_000_000)] = 12_000
    num_val: Annotated[int, Within(1, 10_000_000)] = 840
    val_fraction: Annotated[float, Within(0.1, 0.9)] = 0.2
    seed: Annotated[int, Within(0, MOST_SEED)] = 1234

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moving:
    """A digit of a video.

    Attributes:
        source: Index of the handwritten digit.
        digit: The digit.
        towards: Direction of its way.
    """

    source: int
    digit: int
    towards: Direction


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """The digit of a picture.

    Attributes:
        source: Index of the handwritten digit.
        digit: The digit.
    """

    source: int
    digit: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and its answer.

    Attributes:
        question: Text of the question, without placeholders.
        answer: Text of the expected answer.
    """

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OmniSample:
    """What is asked in one sample, and what its files show.

    Attributes:
        kind: Kind of the question that the sample is for.
        asked: Questions: that one, and in the train split others that its files answer, in any
            order.
        shown: The digit of its picture; None without a picture.
        dialled: The number of its call; None without a call.
        moving: The digits of its video, one or two; empty without a video.
    """

    kind: Kind
    asked: tuple[Asked, ...]
    shown: Shown | None = None
    dialled: str | None = None
    moving: tuple[Moving, ...] = ()

    @property
    def media(self) -> tuple[Medium, ...]:
        """The media of its files, in their order in the text."""
        there: Mapping[Medium, bool] = {
            "image": self.shown is not None,
            "audio": self.dialled is not None,
            "video": bool(self.moving),
        }
        return tuple(medium for medium, is_there in there.items() if is_there)


@dataclass(frozen=True, kw_only=True, slots=True)
class KindFacts:
    """What is known about a kind of questions.

    Attributes:
        label: What it asks, for tables.
        chances: Best exact match for somebody who is not shown one of the media, but all others, 0
            to 1; only media that the question needs.
    """

    label: str
    chances: Mapping[Medium, float]


KINDS: Mapping[Kind, KindFacts] = {
    "shown": KindFacts(label="digit shown", chances={"image": 1 / 10}),
    # Half of the numbers have one digit.
    "dialled": KindFacts(label="number dialled", chances={"audio": 1 / 20}),
    "moves": KindFacts(label="where it moves", chances={"video": 1 / 4}),
    "mover": KindFacts(label="which of two moves so", chances={"video": 1 / 10}),
    "same": KindFacts(label="shown and dialled alike", chances={"image": 1 / 2, "audio": 1 / 2}),
    # Without the call there are still two directions.
    "follow": KindFacts(label="where the dialled moves", chances={"audio": 1 / 2, "video": 1 / 4}),
    "all": KindFacts(
        label="all three digits",
        chances={"image": 1 / 10, "audio": 1 / 10, "video": 1 / 10},
    ),
}
"""Every kind of question."""

# Hard kinds are asked more often.
_WEIGHTS: Mapping[Kind, float] = {
    "shown": 0.7,
    "dialled": 2,
    "moves": 0.5,
    "mover": 1.5,
    "same": 1.5,
    "follow": 1.5,
    "all": 1,
}


class _Drawing:
    """Random choices among the handwritten digits of a split.

    Args:
        sources: Indices of these digits.
        labels: Digit of every handwritten image.
        rng: Random generator.
    """

    def __init__(
        self, sources: Sequence[int], labels: Sequence[int], rng: np.random.Generator
    ) -> None:
        self._by_digit: Mapping[int, list[int]] = defaultdict(list)
        for source in sources:
            self._by_digit[labels[source]].append(source)
        self._rng = rng

    def choose[T](self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        return options[int(self._rng.integers(len(options)))]

    def digit(self, *, but: int | None = None) -> int:
        """A digit, all equally likely."""
        return self.choose([digit for digit in sorted(self._by_digit) if digit != but])

    def shown(self, digit: int) -> Shown:
        """A picture of a digit."""
        return Shown(source=self.choose(self._by_digit[digit]), digit=digit)

    def moving(self, digit: int, towards: Direction) -> Moving:
        """A digit that moves."""
        return Moving(source=self.choose(self._by_digit[digit]), digit=digit, towards=towards)

    def one_moving(self) -> tuple[Moving]:
        """Any digit, moving anywhere."""
        return (self.moving(self.digit(), self.choose(_DIRECTIONS)),)

    def two_moving(self) -> tuple[Moving, Moving]:
        """Two different digits, moving in opposite directions."""
        first = self.digit()
        towards = self.choose(_DIRECTIONS)
        return (
            self.moving(first, towards),
            self.moving(self.digit(but=first), OPPOSITE[towards]),
        )


def plan_samples(
    split: Split, sources: Sequence[int], labels: Sequence[int], config: OmniDigitsConfig
) -> Iterator[OmniSample]:
    """Choose digits and questions of a split, a function of the seed alone.

    Args:
        split: Name of the split.
        sources: Indices of the handwritten digits of this split.
        labels: Digit of every handwritten image.
        config: Numbers of samples and seed.
    """
    rng = np.random.default_rng([config.seed, 1 if split == "train" else 2])
    drawing = _Drawing(sources, labels, rng)
    kinds = tuple(KINDS)
    weights = np.array([_WEIGHTS[kind] for kind in kinds])
    count = config.num_train if split == "train" else config.num_val
    for index in range(count):
        drawn = int(rng.choice(len(kinds), p=weights / weights.sum()))
        kind = kinds[drawn] if split == "train" else kinds[index % len(kinds)]
        sample = _PLANS[kind](drawing)
        if split == "train":
            asked = [*sample.asked, *_others(sample)]
            order = rng.permutation(len(asked)).tolist()
            sample = replace(sample, asked=tuple(asked[i] for i in order))
        yield sample


def _others(sample: OmniSample) -> Iterator[Asked]:
    """Questions about single media that the files of a sample answer as well."""
    found = []
    if sample.shown is not None:
        found.append(Asked(_SHOWN, str(sample.shown.digit)))
    if sample.dialled is not None:
        found.append(Asked(_DIALLED, sample.dialled))
    if len(sample.moving) == 1:
        found.append(Asked(_MOVES, sample.moving[0].towards))
    found += [Asked(_mover_to(moving.towards), str(moving.digit)) for moving in sample.moving]
    return (asked for asked in found if asked not in sample.asked)


def _mover_to(towards: Direction) -> str:
    return f"Which digit moves {towards}?"


def _shown(drawing: _Drawing) -> OmniSample:
    shown = drawing.shown(drawing.digit())
    return OmniSample(
        kind="shown",
        asked=(Asked(_SHOWN, str(shown.digit)),),
        shown=shown,
    )


def _dialled(drawing: _Drawing) -> OmniSample:
    length = drawing.choose(range(1, _LONGEST_NUMBER + 1))
    number = "".join(str(drawing.choose(range(10))) for _ in range(length))
    return OmniSample(
        kind="dialled",
        asked=(Asked(_DIALLED, number),),
        dialled=number,
    )


def _moves(drawing: _Drawing) -> OmniSample:
    moving = drawing.one_moving()
    return OmniSample(
        kind="moves",
        asked=(Asked(_MOVES, moving[0].towards),),
        moving=moving,
    )


def _mover(drawing: _Drawing) -> OmniSample:
    moving = drawing.two_moving()
    asked = drawing.choose(moving)
    return OmniSample(
        kind="mover",
        asked=(Asked(_mover_to(asked.towards), str(asked.digit)),),
        moving=moving,
    )


def _same(drawing: _Drawing) -> OmniSample:
    is_same = drawing.choose((True, False))
    shown = drawing.shown(drawing.digit())
    dialled = shown.digit if is_same else drawing.digit(but=shown.digit)
    return OmniSample(
        kind="same",
        asked=(Asked("Is it the dialled digit?", "yes" if is_same else "no"),),
        shown=shown,
        dialled=str(dialled),
    )


def _follow(drawing: _Drawing) -> OmniSample:
    moving = drawing.two_moving()
    asked = drawing.choose(moving)
    return OmniSample(
        kind="follow",
        asked=(Asked("Where does the dialled digit move?", asked.towards),),
        dialled=str(asked.digit),
        moving=moving,
    )


def _all(drawing: _Drawing) -> OmniSample:
    shown, dialled, moving = drawing.shown(drawing.digit()), drawing.digit(), drawing.one_moving()
    return OmniSample(
        kind="all",
        asked=(Asked("Which digits?", f"{shown.digit} {dialled} {moving[0].digit}"),),
        shown=shown,
        dialled=str(dialled),
        moving=moving,
    )


_PLANS: Mapping[Kind, Callable[[_Drawing], OmniSample]] = {
    "shown": _shown,
    "dialled": _dialled,
    "moves": _moves,
    "mover": _mover,
    "same": _same,
    "follow": _follow,
    "all": _all,
}
