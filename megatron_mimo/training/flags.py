"""From a command line and YAML files to a `TrainConfig`.

Both are read into settings, (flag, value, where it stands), and checked alike; tyro then parses
them, files first, so that the command line wins.
"""

import contextlib
import dataclasses
import difflib
import io
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, UseAppendAction, arg

from megatron_mimo.training.config import TrainConfig

# Of each set at most one is on; a later source's choice replaces an earlier one's.
_EXCLUSIVE = (("bf16", "fp32"),)


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandLine:
    """Train a multimodal model whose modules live on separate process grids.

    Attributes:
        config: YAML file that sets any flag below, as a key without the dashes; the command line
            wins. May be given several times, later files win.
        print_config: Show the resolved flags as YAML and stop.
        train: The flags.
    """

    config: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE")] = ()
    print_config: FlagCreatePairsOff[bool] = False
    train: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True, slots=True)
class _Flag:
    """One known flag: what it takes."""

    kind: type | tuple[str, ...]  # bool, int, float, str, or the choices
    has_negative: bool
    repeatable: bool

    @property
    def expected(self) -> str:
        if isinstance(self.kind, tuple):
            return f"one of {', '.join(self.kind)}"
        return {bool: "true or false", int: "a whole number", float: "a number"}.get(
            self.kind, "text"
        )


@dataclass(frozen=True, slots=True)
class _Setting:
    """A flag as given. `value` is None for a switch; `where` is empty on the command line."""

    name: str
    value: str | None
    where: str = ""

    @property
    def token(self) -> str:
        return f"--{self.name}" if self.value is None else f"--{self.name}={self.value}"

    @property
    def as_typed(self) -> str:
        if self.where:
            return self.where
        return f"--{self.name}" if self.value is None else f"--{self.name} {self.value}"


def parse[T: CommandLine](argv: Sequence[str], into: type[T], *, prog: str) -> T:
    """Read a command line, and the files that it names.

    `--help` prints the help and exits.

    Args:
        argv: Arguments after the program's name.
        into: `CommandLine`, or a subclass with more flags of its own.
        prog: The program's name in the help text.

    Raises:
        ValueError: A flag or key is unknown (the nearest known one is named), or a value does not
            parse; names the flag, or the file and key.
    """
    if "-h" in argv or "--help" in argv:
        tyro.cli(into, prog=prog, args=["--help"], config=(OmitArgPrefixes,))
    known = _known_flags(into)
    typed = list(_read_argv(argv, known))
    in_files = [
        setting
        for entry in typed
        if entry.name == "config" and entry.value is not None
        for setting in _read_file(entry.value)
    ]
    for group in _EXCLUSIVE:
        if any(setting.name in group for setting in typed):
            in_files = [setting for setting in in_files if setting.name not in group]
    line = _instantiate(into, in_files + typed, known)
    _refuse_both(in_files + typed)
    return line


def to_yaml(config: TrainConfig) -> str:
    """The flags as YAML that `--config` reads back to the same config, section by section."""
    parts = []
    for section in dataclasses.fields(config):
        values = dataclasses.asdict(getattr(config, section.name))
        flat = {
            name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }
        parts.append(f"# {section.name}\n{yaml.safe_dump(flat, sort_keys=False)}")
    return "\n".join(parts)


def _known_flags(root: Any) -> dict[str, _Flag]:
    """Every flag under a dataclass, by its kebab-case name."""
    flags: dict[str, _Flag] = {}
    for name, hint in get_type_hints(root, include_extras=True).items():
        plain, marks = _strip(hint)
        if dataclasses.is_dataclass(plain):
            flags |= _known_flags(plain)
            continue
        repeatable = get_origin(plain) is tuple
        if repeatable:
            plain = get_args(plain)[0]
        flags[name.replace("_", "-")] = _Flag(
            kind=get_args(plain) if get_origin(plain) is Literal else plain,
            has_negative=plain is bool and FlagCreatePairsOff not in marks,
            repeatable=repeatable,
        )
    return flags


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


def _read_argv(argv: Iterable[str], known: Mapping[str, _Flag]) -> Iterator[_Setting]:
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            raise ValueError(f"unexpected argument {token!r}: expected a flag, as in --train-iters")
        typed, equals, value = token[2:].partition("=")
        name = typed.replace("_", "-")
        positive = name.removeprefix("no-")
        if name not in known and not (positive in known and known[positive].has_negative):
            raise ValueError(f"unknown flag --{typed}: the nearest is --{_nearest(name, known)}")
        if name not in known or known[name].kind is bool:
            if equals:
                raise ValueError(f"{token}: --{name} takes no value")
            yield _Setting(name, None)
            continue
        if not equals:
            if not tokens or tokens[0].startswith("--"):
                raise ValueError(f"--{name} has no value: expected {known[name].expected}")
            value = tokens.pop(0)
        yield _Setting(name, value)


def _read_file(path: str) -> Iterator[_Setting]:
    known = _known_flags(TrainConfig)
    for typed, value in _load_mapping(path).items():
        name = str(typed).replace("_", "-")
        where = f"{path}: key {typed!r}"
        if name not in known:
            raise ValueError(f"{where} is unknown: the nearest is {_nearest(name, known)!r}")
        if value is None:
            continue  # As if left out.
        flag = known[name]
        if flag.repeatable and isinstance(value, list):
            for item in value:
                yield _Setting(name, _scalar(item, flag, where), where)
        elif flag.kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{where}: expected true or false, not {value!r}")
            if value or flag.has_negative:
                yield _Setting(name if value else f"no-{name}", None, where)
        else:
            yield _Setting(name, _scalar(value, flag, where), where)


def _load_mapping(path: str) -> dict[Any, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"--config {path} is not YAML: {detail}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected keys and values, as in `train-iters: 100`")
    return content


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, refusing a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Read a mapping.

        Raises:
            yaml.YAMLError: A key is given twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value).replace("_", "-")
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given twice", key.start_mark
                )
            seen.add(name)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _scalar(value: Any, flag: _Flag, where: str) -> str:
    """A YAML value as one would type it; 1e-4 is text to YAML, and a number here."""
    is_text = flag.kind is str or isinstance(flag.kind, tuple)
    if isinstance(value, bool | list | dict) or (is_text and not isinstance(value, str)):
        quote = ", in quotes" if is_text else ""
        raise ValueError(f"{where}: expected {flag.expected}{quote}, not {value!r}")
    return str(value)


def _instantiate[T: CommandLine](
    into: type[T], settings: Sequence[_Setting], known: Mapping[str, _Flag]
) -> T:
    line = _try_tyro(into, [setting.token for setting in settings])
    if line is not None:
        return line
    # tyro only prints what is wrong, in a box for humans; the culprit fails alone too.
    for setting in settings:
        if _try_tyro(into, [setting.token]) is None:
            expected = known[setting.name].expected
            raise ValueError(f"{setting.as_typed}: expected {expected}, not {setting.value!r}")
    raise AssertionError(f"tyro refuses {[setting.token for setting in settings]}")


def _try_tyro[T: CommandLine](into: type[T], tokens: Sequence[str]) -> T | None:
    # Values that do not parse are printed even without console outputs.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return tyro.cli(into, args=tokens, config=(OmitArgPrefixes,), console_outputs=False)
        except SystemExit:
            return None


def _refuse_both(settings: Sequence[_Setting]) -> None:
    for group in _EXCLUSIVE:
        given = {setting.name: setting.as_typed for setting in settings if setting.name in group}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given.values())}: expected one of them")


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
