"""Command lines that are dataclasses: each field a flag, checked before tyro builds the object.

tyro explains errors in boxes for humans; here an error is one line that names the flag as typed.
"""

import contextlib
import dataclasses
import difflib
import io
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, arg


@dataclass(frozen=True, slots=True)
class Flag:
    """A known flag.

    Attributes:
        kind: bool, int, float, str, or the choices.
        has_negative: Whether it has a --no- twin.
        repeatable: Whether each use adds a value.
        metavar: What stands for its value in texts; None for what its kind says.
    """

    kind: type | tuple[str, ...]
    has_negative: bool
    repeatable: bool
    metavar: str | None = None

    def takes(self, value: str | None) -> bool:
        """Whether a text is a value of this flag; None is what a switch has."""
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
        """What it takes, for errors."""
        if isinstance(self.kind, tuple):
            return f"one of {', '.join(self.kind)}"
        return {bool: "true or false", int: "a whole number", float: "a number"}.get(
            self.kind, "text"
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """A flag as given.

    Attributes:
        name: In kebab case, without dashes; of a switch that is turned off, with "no-".
        value: Text; None for a switch.
        where: File and key; empty on the command line.
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


def parse_arguments[T](argv: Sequence[str], into: type[T], *, prog: str) -> T:
    """Read a command line into a dataclass.

    `--help` prints the help and exits.

    Args:
        argv: Arguments after the program's name.
        into: A dataclass whose fields all have defaults; fields of nested ones are flags too.
        prog: The program's name in the help text.

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
    for name, hint in get_type_hints(root, include_extras=True).items():
        plain, marks = _strip(hint)
        if dataclasses.is_dataclass(plain):
            flags |= known_flags(plain)
            continue
        repeatable = get_origin(plain) is tuple
        if repeatable:
            plain = get_args(plain)[0]
        flags[name.replace("_", "-")] = Flag(
            kind=get_args(plain) if get_origin(plain) is Literal else plain,
            has_negative=plain is bool and FlagCreatePairsOff not in marks,
            repeatable=repeatable,
            metavar=_metavar(marks),
        )
    return flags


def _metavar(marks: Iterable[Any]) -> str | None:
    """Of several, the outermost, which comes last."""
    settings: Any = type(arg())  # Which has no public name.
    named = [mark.metavar for mark in marks if isinstance(mark, settings)]
    return next((metavar for metavar in reversed(named) if metavar is not None), None)


def _strip(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its annotations and without None, and the annotations."""
    marks: tuple[Any, ...] = ()
    while True:
        if get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            marks += tuple(more)
        elif get_origin(hint) in (Union, types.UnionType):
            (hint,) = (option for option in get_args(hint) if option is not type(None))
        else:
            return hint, marks


def read_argv(argv: Iterable[str], known: Mapping[str, Flag]) -> Iterator[Setting]:
    """Cut a command line into settings.

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


def build[T](into: type[T], settings: Sequence[Setting], known: Mapping[str, Flag]) -> T:
    """Make the dataclass; of a flag that is set twice, the last setting holds.

    Raises:
        ValueError: A value does not parse, or the dataclass itself refuses the values.
    """
    for setting in settings:
        if setting.name in known and not known[setting.name].takes(setting.value):
            raise ValueError(
                f"{setting.as_typed}: expected {known[setting.name].expected}, "
                f"not {setting.value!r}"
            )
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


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like `name`."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
