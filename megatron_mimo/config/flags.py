"""Conversion of a command line and YAML files to a `TrainConfig`.

Both are read into settings, (flag, value, location), and checked by the same rules; tyro then
parses them, files first, so that the command line wins.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import yaml
from tyro.conf import FlagCreatePairsOff, UseAppendAction, arg

from megatron_mimo.config.arguments import (
    Flag,
    Setting,
    build,
    known_flags,
    nearest,
    read_argv,
    show_help,
)
from megatron_mimo.config.sections import TrainConfig
from megatron_mimo.config.yaml_file import load_mapping
from megatron_mimo.settings import InsteadOf, declared, values


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandLine:
    """Train a multimodal model whose modules live on separate process grids.

    Attributes:
        config: YAML file that sets any flag below, as a key without the dashes; the command line
            wins. May be given several times, later files win.
        print_config: Whether to show the resolved flags as YAML and stop.
        train: Flags of training.
    """

    config: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE")] = ()
    print_config: FlagCreatePairsOff[bool] = False
    train: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)


def parse[T: CommandLine](argv: Sequence[str], into: type[T], *, prog: str) -> T:
    """Read a command line, and the files that it names.

    `--help` prints the help and exits.

    Args:
        argv: Arguments after the program's name.
        into: Type of the result: `CommandLine`, or a subclass with further flags.
        prog: Name of the program in the help text.

    Raises:
        ValueError: A flag or key is unknown (the nearest known one is named), or a value does not
            parse; the message names the flag, or the file and key.
    """
    show_help(argv, into, prog=prog)
    known = known_flags(into)
    typed = list(read_argv(argv, known))
    files = [
        list(_read_file(entry.value))
        for entry in typed
        if entry.name == "config" and entry.value is not None
    ]
    choices = _choices(into)
    settings = _last_choices([*files, typed], choices)
    line = build(into, settings, known)
    _refuse_both(settings, choices)
    return line


def to_yaml(config: TrainConfig) -> str:
    """The flags as YAML that `--config` reads back to the same config, section by section."""
    return "\n".join(
        f"# {name}\n{yaml.safe_dump(values, sort_keys=False)}"
        for name, values in _by_section(config).items()
    )


def flat(config: TrainConfig) -> dict[str, Any]:
    """Value of every flag by its name without leading dashes, as in YAML or JSON."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values(config).items()
    }


def _by_section(config: TrainConfig) -> dict[str, dict[str, Any]]:
    found = flat(config)
    sections: dict[str, dict[str, Any]] = {}
    for flag in declared(TrainConfig):
        sections.setdefault(flag.path[0], {})[flag.name] = found[flag.name]
    return sections


def from_values(values: Mapping[str, Any], where: str) -> TrainConfig:
    """Flags from their values, as a YAML file has them.

    Args:
        values: Value of each flag by its name, with dashes or underscores; None for a flag that is
            left out.
        where: Where the values are from, for error messages.

    Raises:
        ValueError: A flag is unknown, or a value is not one of its flag.
    """
    return build(TrainConfig, list(_settings(values, where)), known_flags(TrainConfig))


def _read_file(path: str) -> Iterator[Setting]:
    return _settings(load_mapping(path, flag="--config"), path)


def _settings(values: Mapping[str, Any], origin: str) -> Iterator[Setting]:
    known = known_flags(TrainConfig)
    for typed, value in values.items():
        name = str(typed).replace("_", "-")
        where = f"{origin}: key {typed!r}"
        if value is None:
            continue  # The same as leaving it out.
        if name == "grids":
            yield from _grids(value, where)
            continue
        if name not in known:
            raise ValueError(f"{where} is unknown: the nearest is {nearest(name, known)!r}")
        flag = known[name]
        if flag.repeatable and isinstance(value, list):
            for item in value:
                yield Setting(name, _scalar(item, flag, where), where)
        elif flag.kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{where}: expected true or false, not {value!r}")
            if value or flag.has_negative:
                yield Setting(name if value else f"no-{name}", None, where)
        else:
            yield Setting(name, _scalar(value, flag, where), where)


def _grids(value: Any, where: str) -> Iterator[Setting]:
    """The --grid settings that `grids: {audio: {tp: 2}}` is equivalent to."""
    if not isinstance(value, dict) or not all(isinstance(axes, dict) for axes in value.values()):
        raise ValueError(f"{where}: expected sizes by module, as in `grids: {{audio: {{tp: 2}}}}`")
    for module, axes in value.items():
        for axis, size in axes.items():
            yield Setting("grid", f"{module}.{axis}={size}", f"{where}: {module}.{axis}")


def _scalar(value: Any, flag: Flag, where: str) -> str:
    """A YAML value as typed on the command line; 1e-4 is text in YAML, but a number here."""
    is_text = flag.kind is str or isinstance(flag.kind, tuple)
    if isinstance(value, bool | list | dict) or (is_text and not isinstance(value, str)):
        quote = ", in quotes" if is_text else ""
        raise ValueError(f"{where}: expected {flag.expected}{quote}, not {value!r}")
    return str(value)


def _choices(into: type) -> list[set[str]]:
    """Sets of flags of which at most one is on; a later source's choice replaces an earlier's."""
    sets: list[set[str]] = []
    for flag in declared(into):
        for mark in flag.marked(InsteadOf):
            names = {flag.name, *mark.names}
            shared = [group for group in sets if group & names]
            sets = [group for group in sets if group not in shared]
            sets.append(names.union(*shared))
    return sets


def _last_choices(
    sources: Sequence[Sequence[Setting]], choices: Sequence[set[str]]
) -> list[Setting]:
    """All settings in order, without the choices that a later source replaces."""
    kept: list[Setting] = []
    for source in sources:
        chosen = {setting.name for setting in source}
        replaced = {name for group in choices if chosen & group for name in group}
        kept = [setting for setting in kept if setting.name not in replaced]
        kept += source
    return kept


def _refuse_both(settings: Sequence[Setting], choices: Sequence[set[str]]) -> None:
    for group in choices:
        given = {setting.name: setting.as_typed for setting in settings if setting.name in group}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given.values())}: expected one of them")
