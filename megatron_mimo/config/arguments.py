"""Command lines as dataclasses: each field is a flag, checked before tyro builds the object.

tyro explains errors in boxes; here an error is one line that names the flag as typed.
"""

import contextlib
import difflib
import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes

from megatron_mimo.settings import Bound, declared


@dataclass(frozen=True, slots=True)
class Flag:
    """A known flag.

    Attributes:
        kind: Type of its values, bool, int, float or str, or the choices.
        has_negative: Whether there is also a flag with --no-.
        repeatable: Whether each use adds a value.
        metavar: Placeholder of its value in help texts; None for that of its kind.
        bounds: Bounds of its numbers.
    """

    kind: type | tuple[str, ...]
    has_negative: bool
    repeatable: bool
    metavar: str | None = None
    bounds: tuple[Bound, ...] = ()

    def takes(self, value: str | None) -> bool:
        """Whether a text is a value of this flag; a switch has the value None."""
        if self.kind is bool or value is None:
            return value is None and self.kind is bool
        if isinstance(self.kind, tuple):
            return value in self.kind
        try:
            self.kind(value)
        except ValueError:
            return False
        return True

    @property
    def expected(self) -> str:
        """Expected values, for error messages."""
        if isinstance(self.kind, tuple):
            return f"one of {', '.join(self.kind)}"
        return {bool: "true or false", int: "a whole number", float: "a number"}.get(
            self.kind, "text"
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """A flag as given.

    Attributes:
        name: Name in kebab case, without leading dashes; with "no-" for a switch that is turned
            off.
        value: Text of the value; None for a switch.
        where: File and key of the setting; empty on the command line.
    """

    name: str
    value: str | None
    where: str = ""

    @property
    def token(self) -> str:
        """The setting as one argument."""
        return f"--{self.name}" if self.value is None else f"--{self.name}={self.value}"

    @property
    def as_typed(self) -> str:
        """The setting as its author sees it, for errors."""
        if self.where:
            return self.where
        return f"--{self.name}" if self.value is None else f"--{self.name} {self.value}"

    @property
    def as_named(self) -> str:
        """The setting without its value, as its author sees it."""
        return self.where or f"--{self.name}"


def parse_arguments[T](argv: Sequence[str], into: type[T], *, prog: str) -> T:
    """Read a command line into a dataclass.

    `--help` prints the help and exits.

    Args:
        argv: Arguments after the program's name.
        into: Dataclass whose fields all have defaults; fields of nested ones are flags too.
        prog: Name of the program in the help text.

    Raises:
        ValueError: A flag is unknown (the nearest known one is named), or a value does not parse.
    """
    show_help(argv, into, prog=prog)
    known = known_flags(into)
    return build(into, list(read_argv(argv, known)), known)


def show_help(argv: Sequence[str], into: type, *, prog: str) -> None:
    """Print the help and exit, if the command line asks for it."""
    if "-h" in argv or "--help" in argv:
        tyro.cli(into, prog=prog, args=["--help"], config=(OmitArgPrefixes,))


def known_flags(root: Any) -> dict[str, Flag]:
    """Every flag under a dataclass, by its kebab-case name."""
    flags: dict[str, Flag] = {}
    for flag in declared(root):
        repeatable = get_origin(flag.kind) is tuple
        kind = get_args(flag.kind)[0] if repeatable else flag.kind
        flags[flag.name] = Flag(
            kind=get_args(kind) if get_origin(kind) is Literal else kind,
            has_negative=kind is bool and FlagCreatePairsOff not in flag.marks,
            repeatable=repeatable,
            metavar=flag.metavar,
            bounds=flag.bounds,
        )
    return flags


def read_argv(argv: Iterable[str], known: Mapping[str, Flag]) -> Iterator[Setting]:
    """Split a command line into settings.

    Raises:
        ValueError: A flag is unknown, lacks its value, or has one too many.
    """
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            raise ValueError(
                f"unexpected argument {token!r}: expected a flag, which starts with --"
            )
        typed, equals, value = token[2:].partition("=")
        name = typed.replace("_", "-")
        positive = name.removeprefix("no-")
        if name not in known and not (positive in known and known[positive].has_negative):
            raise ValueError(f"unknown flag --{typed}: the nearest is --{nearest(name, known)}")
        if name not in known or known[name].kind is bool:
            if equals:
                raise ValueError(f"{token}: --{name} takes no value")
            yield Setting(name, None)
            continue
        if not equals:
            if not tokens or tokens[0].startswith("--"):
                raise ValueError(f"--{name} has no value: expected {known[name].expected}")
            value = tokens.pop(0)
        yield Setting(name, value)


def without_flags(argv: Iterable[str], names: Collection[str]) -> list[str]:
    """A command line that was read before, without some flags, all of which have a value.

    Args:
        argv: Command line.
        names: Flags with their dashes.
    """
    kept: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        name, equals, _ = token.replace("_", "-").partition("=")
        if name not in names:
            kept.append(token)
        elif not equals:
            next(tokens)
    return kept


def build[T](into: type[T], settings: Sequence[Setting], known: Mapping[str, Flag]) -> T:
    """Build the dataclass; the last setting of a flag wins.

    Raises:
        ValueError: A value does not parse or is out of bounds, or the dataclass itself refuses the
            values.
    """
    for setting in settings:
        if setting.name in known and not known[setting.name].takes(setting.value):
            raise ValueError(
                f"{setting.as_typed}: expected {known[setting.name].expected}, "
                f"not {setting.value!r}"
            )
        if setting.name in known and known[setting.name].bounds:
            _check_bounds(setting, known[setting.name])
    tokens = [setting.token for setting in settings]
    # tyro turns what a dataclass refuses into an exit, and prints it in a box.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return tyro.cli(into, args=tokens, config=(OmitArgPrefixes,), console_outputs=False)
        except SystemExit as stop:
            cause: BaseException | None = stop
            while cause is not None and not isinstance(cause, ValueError):
                cause = cause.__context__
            if cause is None:
                raise AssertionError(f"tyro refuses {tokens}") from stop
            raise ValueError(str(cause)) from stop


def _check_bounds(setting: Setting, flag: Flag) -> None:
    """Refuse a number out of bounds here, where its file and key are known."""
    assert isinstance(flag.kind, type)
    for bound in flag.bounds:
        if not bound.admits(flag.kind(setting.value)):
            raise ValueError(f"{setting.as_named} is {setting.value}: expected {bound.expected}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most similar to `name`."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
