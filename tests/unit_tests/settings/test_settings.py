"""Flags of a dataclass and its parts, and what their marks refuse."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from megatron_mimo.settings import (
    AtLeast,
    Derived,
    InsteadOf,
    MoreThan,
    Number,
    OnlyWith,
    Part,
    Real,
    Switch,
    Within,
    check_bounds,
    check_fields,
    check_settings,
    declared,
    named,
    values,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Oven:
    """An oven.

    Attributes:
        heat: Heat in degrees.
        steam: Fraction of steam.
        fan: Whether the fan runs.
        fan_speed: Speed of the fan.
        hot: Heat that follows from others.
    """

    heat: Annotated[float, named("--oven-heat"), MoreThan(0, 500)] = 200.0
    steam: Annotated[float, Within(0, 1), OnlyWith("--bread rye", "--fan")] = 0.0
    fan: Switch = False
    fan_speed: Annotated[Real, AtLeast(1, below=9), OnlyWith("--fan")] = None
    hot: Derived[float | None] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Kitchen:
    """A kitchen.

    Attributes:
        bread: Kind of bread.
        oven: The oven.
        loaves: Number of loaves.
        kilograms: Number of kilograms.
        sourdough: Whether it is sourdough.
        shelf: Where the shelf begins and ends.
    """

    bread: Literal["rye", "wheat"] = "wheat"
    oven: Part[Oven] = field(default_factory=Oven)
    loaves: Annotated[Number, Within(1, 10_000)] = None
    kilograms: Annotated[Number, Within(0, 5), InsteadOf("--loaves")] = None
    sourdough: Annotated[bool, OnlyWith("--bread rye")] = True
    shelf: Annotated[tuple[float, float], Within(0, 1)] = (0.0, 1.0)


def kitchen(**fields: Any) -> Kitchen:
    oven = {name: fields.pop(name) for name in Oven.__slots__ if name in fields}
    return Kitchen(oven=Oven(**oven), **fields)


def test_flags_stand_in_the_order_of_fields_with_parts_in_place() -> None:
    flags = list(declared(Kitchen))
    assert [flag.name for flag in flags] == [
        *("bread", "oven-heat", "steam", "fan", "fan-speed"),
        *("loaves", "kilograms", "sourdough", "shelf"),
    ]
    heat = flags[1]
    assert (heat.path, heat.owner, heat.kind, heat.default) == (
        ("oven", "heat"),
        Oven,
        float,
        200.0,
    )
    assert flags[4].metavar == "FLOAT"
    assert heat.value(kitchen(heat=180.0)) == 180.0


def test_values_have_no_settings_that_follow_from_others() -> None:
    assert values(kitchen(hot=3.0, loaves=2)) == values(kitchen(loaves=2))
    assert values(kitchen(loaves=2))["loaves"] == 2


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"fan": True, "fan_speed": 8.5},
        {"fan": True, "steam": 1.0},
        {"bread": "rye", "steam": 0.5, "sourdough": False},
        {"kilograms": 3},
    ],
)
def test_what_works_is_accepted(fields: dict[str, Any]) -> None:
    check_settings(kitchen(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heat": 0.0}, "--oven-heat is 0.0: expected more than 0, and at most 500"),
        ({"heat": float("nan")}, "--oven-heat is nan: expected more than 0, and at most 500"),
        ({"steam": 1.5}, "--steam is 1.5: expected 0 to 1"),
        ({"steam": float("nan")}, "--steam is nan: expected 0 to 1"),
        ({"fan_speed": 9.0}, "--fan-speed is 9.0: expected 1 or more, and below 9"),
        ({"fan_speed": float("inf")}, "--fan-speed is inf: expected 1 or more, and below 9"),
        ({"loaves": 0}, "--loaves is 0: expected 1 to 10,000"),
        ({"loaves": 2.0}, "--loaves is 2.0: expected a whole number, 1 to 10,000"),
        ({"loaves": True}, "--loaves is True: expected a whole number, 1 to 10,000"),
        ({"heat": "hot"}, "--oven-heat is hot: expected a number, more than 0, and at most 500"),
        ({"heat": None}, "--oven-heat is None: expected a number, more than 0, and at most 500"),
        ({"bread": "stone"}, "--bread is stone: expected one of rye, wheat"),
        ({"fan": 1}, "--fan is 1: expected true or false"),
        ({"shelf": (0.0,)}, "--shelf is (0.0,): expected 2 values, each a number, 0 to 1"),
        ({"shelf": 0.5}, "--shelf is 0.5: expected 2 values, each a number, 0 to 1"),
        ({"shelf": (0.0, 2.0)}, "--shelf is (0.0, 2.0): expected 0 to 1"),
    ],
)
def test_values_that_are_not_as_declared_are_named(fields: dict[str, Any], message: str) -> None:
    for check in (check_bounds, check_settings):
        with pytest.raises(ValueError) as error:
            check(kitchen(**fields))
        assert str(error.value) == message


def test_fields_that_are_no_flags_are_named_as_they_are_written() -> None:
    with pytest.raises(ValueError, match="^fan_speed is '3': expected a number, 1 or more, and"):
        check_fields(Oven(fan_speed="3"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fan_speed": 2.0}, "--fan-speed 2.0 without --fan: add it, or leave --fan-speed out"),
        (
            {"steam": 0.5},
            "--steam 0.5 without --bread rye or --fan: add one of these, or leave --steam out",
        ),
        (
            {"sourdough": False},
            "--no-sourdough without --bread rye (now wheat): add it, or leave --no-sourdough out",
        ),
        ({"loaves": 2, "kilograms": 3}, "--loaves 2 and --kilograms 3: expected one of them"),
    ],
)
def test_flags_that_do_not_go_together_are_named(fields: dict[str, Any], message: str) -> None:
    check_bounds(kitchen(**fields))
    with pytest.raises(ValueError) as error:
        check_settings(kitchen(**fields))
    assert str(error.value) == message


def test_flags_that_lack_the_same_are_named_together() -> None:
    @dataclass(frozen=True)
    class Two:
        on: Switch = False
        one: Annotated[int, OnlyWith("--on")] = 0
        two: Annotated[Switch, OnlyWith("--on")] = False

    with pytest.raises(ValueError, match="^--one 1 and --two without --on: add it, or leave --one"):
        check_settings(Two(one=1, two=True))


@pytest.mark.parametrize("mark", [OnlyWith, InsteadOf, named])
def test_flags_are_named_as_they_are_typed(mark: Any) -> None:
    with pytest.raises(ValueError, match="'fan': expected a flag as it is typed"):
        mark("fan")
