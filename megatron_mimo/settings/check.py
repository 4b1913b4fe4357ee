"""Checks of settings against their marks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from megatron_mimo.settings.declared import Declared, declared
from megatron_mimo.settings.marks import InsteadOf, OnlyWith, is_on

_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def check_settings(config: Any) -> None:
    """Refuse numbers out of bounds, flags that would do nothing, and two flags for one thing.

    Args:
        config: An object of a dataclass that has all flags.

    Raises:
        ValueError: A check fails; the message has the flags and their values, what is expected, and
            what to do.
    """
    check_bounds(config)
    flags = list(declared(type(config)))
    found = {flag.name: flag.value(config) for flag in flags}
    _check_choices(flags, found)
    _check_companions(flags, found)


def check_bounds(config: Any) -> None:
    """Refuse values of another type, and numbers out of bounds, of flags.

    Args:
        config: An object of any dataclass of flags.

    Raises:
        ValueError: A value is not what its field declares; the message has the flag, its value, and
            what is expected.
    """
    for flag in declared(type(config)):
        expected = unmet(flag, flag.value(config))
        if expected is not None:
            raise ValueError(f"--{flag.name} is {flag.value(config)}: expected {expected}")


def check_fields(config: Any) -> None:
    """Refuse values of another type, and numbers out of bounds, of fields that are no flags.

    Args:
        config: An object of a dataclass whose fields files and `--override` set by their names.

    Raises:
        ValueError: A value is not what its field declares; the message has the field, its value,
            and what is expected.
    """
    for field in declared(type(config)):
        expected = unmet(field, field.value(config))
        if expected is not None:
            raise ValueError(f"{field.path[-1]} is {field.value(config)!r}: expected {expected}")


def check_multiple(config: Any, field: str, of: str) -> None:
    """Refuse a number that is not a multiple of another.

    Args:
        config: An object of a dataclass with both fields.
        field: Name of the field with the multiple.
        of: Name of the field with the number that it is a multiple of, 1 or more.

    Raises:
        ValueError: It is not a multiple; the message has both fields and their values.
    """
    value, unit = getattr(config, field), getattr(config, of)
    if value % unit:
        raise ValueError(f"{field} is {value}: expected a multiple of {of}, which is {unit}")


def unmet(field: Declared, value: Any) -> str | None:
    """What a field expects, if a value is not that; None where it is.

    Args:
        field: Field as declared, of which only the kind and the bounds count.
        value: Value of any type; None is a field that is left out.
    """
    if value is None and field.is_optional:
        return None
    items: Sequence[Any] = [value]
    if get_origin(field.kind) is tuple:
        number = _number_of_items(field.kind)
        if not isinstance(value, tuple) or (number is not None and len(value) != number):
            return f"{'' if number is None else f'{number} '}values, each {_words(field)}"
        items = value
    for item in items:
        if not _is_kind(item, field.item_kind):
            return _words(field)
        if not all(bound.admits(item) for bound in field.bounds):
            return _range(field)
    return None


def _is_kind(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if kind in (int, float):
        # A switch is a number to Python, and not to the people who write files.
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def _words(field: Declared) -> str:
    """What a value of a field, or one of several, is expected to be."""
    kind = field.item_kind
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    named = _KINDS.get(kind, "text")
    return f"{named}, {_range(field)}" if field.bounds else named


def _range(field: Declared) -> str:
    return " and ".join(bound.expected for bound in field.bounds)


def _number_of_items(kind: Any) -> int | None:
    """Number of values of a tuple type; None for any number."""
    kinds = get_args(kind)
    return None if Ellipsis in kinds else len(kinds)


def _check_choices(flags: Iterable[Declared], found: Mapping[str, Any]) -> None:
    for flag in flags:
        for mark in flag.marked(InsteadOf):
            given = [name for name in found if name in {flag.name, *mark.names}]
            typed = [_typed(name, found[name]) for name in given if is_on(found[name])]
            if len(typed) > 1:
                raise ValueError(f"{' and '.join(typed)}: expected one of them")


def _check_companions(flags: Iterable[Declared], found: Mapping[str, Any]) -> None:
    """Raise one error that names all flags that lack the same companion."""
    lacking: dict[OnlyWith, list[str]] = {}
    for flag in flags:
        for mark in flag.marked(OnlyWith):
            is_given = found[flag.name] != flag.default
            if is_given and not mark.is_met(found):
                lacking.setdefault(mark, []).append(flag.name)
    for mark, names in lacking.items():
        typed = [_typed(name, found[name]) for name in names]
        add = "it" if len(mark.flags) == 1 else "one of these"
        raise ValueError(
            f"{' and '.join(typed)} without {' or '.join(mark.flags)}{_now(mark, found)}: add "
            f"{add}, or leave {' and '.join(text.split()[0] for text in typed)} out"
        )


def _now(mark: OnlyWith, found: Mapping[str, Any]) -> str:
    """The value that would have to change, or nothing."""
    name, _, wanted = mark.flags[0].removeprefix("--").partition(" ")
    return f" (now {found[name]})" if wanted and len(mark.flags) == 1 else ""


def _typed(name: str, value: Any) -> str:
    """A flag as it is typed on the command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"
