"""From a command line and YAML files to a `TrainConfig`.

Both are read into settings, (flag, value, where it stands), and checked alike; tyro then parses
them, files first, so that the command line wins.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import yaml
from tyro.conf import FlagCreatePairsOff, UseAppendAction, arg

from megatron_mimo.training.arguments import (
    Flag,
    Setting,
    build,
    known_flags,
    nearest,
    read_argv,
    show_help,
)
from megatron_mimo.training.config import TrainConfig
from megatron_mimo.training.yaml_file import load_mapping

# Of each set at most one is on; a later source's choice replaces an earlier one's.
_EXCLUSIVE = (
    ("bf16", "fp16", "fp32"),
    ("train-iters", "train-samples"),
    ("lr-warmup-iters", "lr-warmup-samples"),
    ("lr-decay-iters", "lr-decay-samples"),
    ("lr-wsd-decay-iters", "lr-wsd-decay-samples"),
)


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
    show_help(argv, into, prog=prog)
    known = known_flags(into)
    typed = list(read_argv(argv, known))
    files = [
        list(_read_file(entry.value))
        for entry in typed
        if entry.name == "config" and entry.value is not None
    ]
    settings = _last_choices([*files, typed])
    line = build(into, settings, known)
    _refuse_both(settings)
    return line


def to_yaml(config: TrainConfig) -> str:
    """The flags as YAML that `--config` reads back to the same config, section by section."""
    return "\n".join(
        f"# {name}\n{yaml.safe_dump(values, sort_keys=False)}"
        for name, values in _by_section(config).items()
    )


def flat(config: TrainConfig) -> dict[str, Any]:
    """Every flag by its name, without dashes in front, as YAML or JSON has its value."""
    return {
        name: value for values in _by_section(config).values() for name, value in values.items()
    }


def _by_section(config: TrainConfig) -> dict[str, dict[str, Any]]:
    return {
        section.name: {
            name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(getattr(config, section.name)).items()
        }
        for section in dataclasses.fields(config)
    }


def _read_file(path: str) -> Iterator[Setting]:
    known = known_flags(TrainConfig)
    for typed, value in load_mapping(path, flag="--config").items():
        name = str(typed).replace("_", "-")
        where = f"{path}: key {typed!r}"
        if name not in known:
            raise ValueError(f"{where} is unknown: the nearest is {nearest(name, known)!r}")
        if value is None:
            continue  # As if left out.
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


def _scalar(value: Any, flag: Flag, where: str) -> str:
    """A YAML value as one would type it; 1e-4 is text to YAML, and a number here."""
    is_text = flag.kind is str or isinstance(flag.kind, tuple)
    if isinstance(value, bool | list | dict) or (is_text and not isinstance(value, str)):
        quote = ", in quotes" if is_text else ""
        raise ValueError(f"{where}: expected {flag.expected}{quote}, not {value!r}")
    return str(value)


def _last_choices(sources: Sequence[Sequence[Setting]]) -> list[Setting]:
    """All settings in order, without the choices that a later source replaces."""
    kept: list[Setting] = []
    for source in sources:
        chosen = {setting.name for setting in source}
        replaced = {name for group in _EXCLUSIVE if chosen & set(group) for name in group}
        kept = [setting for setting in kept if setting.name not in replaced]
        kept += source
    return kept


def _refuse_both(settings: Sequence[Setting]) -> None:
    for group in _EXCLUSIVE:
        given = {setting.name: setting.as_typed for setting in settings if setting.name in group}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given.values())}: expected one of them")
