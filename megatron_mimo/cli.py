"""The command `megatron-mimo`. Each command imports what it needs, so that help is instant."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import arg

from megatron_mimo import __version__
from megatron_mimo.training.arguments import known_flags, nearest, parse_arguments, show_help
from megatron_mimo.training.flags import CommandLine, parse, to_yaml

_WRONG_USAGE = 2

Command = Callable[[Sequence[str]], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainCommandLine(CommandLine):
    """Train a multimodal model whose modules live on separate process grids.

    Attributes:
        nproc: Start this many ranks on this machine; left out, this process is a rank, as under
            torchrun or srun.
    """

    nproc: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = field(default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; the process's own when None.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage, 3 parity failed.
    """
    try:
        return _dispatch("megatron-mimo", _COMMANDS, sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return _WRONG_USAGE


def _dispatch(prog: str, commands: dict[str, tuple[str, Command]], argv: Sequence[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: {prog} COMMAND [flags]\n")
        for command, (text, _) in commands.items():
            print(f"  {command:<12}{text}")
        print(f"\n`{prog} COMMAND --help` lists the flags of a command.")
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in commands:
        raise ValueError(
            f"{prog}: unknown command {name!r}: the nearest is {nearest(name, commands)!r}"
        )
    return commands[name][1](rest)


def _train(argv: Sequence[str]) -> int:
    line = parse(argv, TrainCommandLine, prog="megatron-mimo train")
    if line.nproc is None:
        from megatron_mimo.training.main import main as train

        return train(argv)
    if line.nproc < 1:
        raise ValueError(f"--nproc is {line.nproc}: expected at least 1")
    from megatron_mimo.training.resolve import resolve

    # Here once, so that a wrong flag starts no ranks.
    resolved = resolve(line.train, line.nproc)
    if line.print_config:
        sys.stdout.write(to_yaml(resolved.config))
        return 0
    from megatron_mimo.training.launch import launch
    from megatron_mimo.training.preload import can_fork

    fork = can_fork(resolved.config.runtime.device)
    return launch(line.nproc, _without_nproc(argv), "megatron_mimo.training", fork=fork)


def _without_nproc(argv: Sequence[str]) -> list[str]:
    kept: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        if token == "--nproc":
            next(tokens)
        elif not token.startswith("--nproc="):
            kept.append(token)
    return kept


def _demo(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.demo.command import DemoConfig, run_demo

    return run_demo(parse_arguments(argv, DemoConfig, prog="megatron-mimo demo"))


def _data(argv: Sequence[str]) -> int:
    return _dispatch("megatron-mimo data", _DATA_COMMANDS, argv)


def _digits(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.data.digits import DigitsCommandLine, run_digits

    return run_digits(parse_arguments(argv, DigitsCommandLine, prog="megatron-mimo data digits"))


def _prepare(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.data.prepare import PrepareConfig, run_prepare

    prog = "megatron-mimo data prepare SOURCE --out DIR"
    source, rest = _positional("SOURCE", argv, PrepareConfig, prog)
    config = parse_arguments(rest, PrepareConfig, prog=prog)
    return run_prepare(source, config)


def _inspect_data(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.data.inspect import InspectCommandLine, run_inspect

    prog = "megatron-mimo data inspect PATH"
    path, rest = _positional("PATH", argv, InspectCommandLine, prog)
    return run_inspect(path, parse(rest, InspectCommandLine, prog=prog))


def _positional(name: str, argv: Sequence[str], into: type, prog: str) -> tuple[str, list[str]]:
    """The one argument that is no flag or a flag's value, and the others; prints help if asked."""
    (found,), rest = _positionals((name,), argv, into, prog)
    return found, rest


def _positionals(
    names: Sequence[str], argv: Sequence[str], into: type, prog: str
) -> tuple[list[str], list[str]]:
    """The arguments that are no flags or their values, and the others; prints help if asked."""
    show_help(argv, into, prog=prog)
    known = known_flags(into)
    found: list[str] = []
    rest: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        if not token.startswith("--"):
            found.append(token)
            continue
        rest.append(token)
        typed, equals, _ = token[2:].partition("=")
        name = typed.replace("_", "-")
        if name not in known and name.removeprefix("no-") not in known:
            raise ValueError(f"unknown flag --{typed}: the nearest is --{nearest(name, known)}")
        if name in known and known[name].kind is not bool and not equals:
            rest += [value for value in [next(tokens, None)] if value is not None]
    if len(found) != len(names):
        shown = f" ({', '.join(found)})" if found else ""
        wanted = f"one {names[0]}" if len(names) == 1 else " and ".join(names)
        raise ValueError(f"{prog}: expected {wanted}, got {len(found)}{shown}")
    return found, rest


def _parity(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.parity.command import ParityConfig, run_parity

    prog = "megatron-mimo parity RUN_A RUN_B"
    (a, b), rest = _positionals(("RUN_A", "RUN_B"), argv, ParityConfig, prog)
    return run_parity(a, b, parse_arguments(rest, ParityConfig, prog=prog))


def _report(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.report.command import ReportConfig, run_report

    prog = "megatron-mimo report RUN"
    run, rest = _positional("RUN", argv, ReportConfig, prog)
    return run_report(run, parse_arguments(rest, ReportConfig, prog=prog))


def _plan(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.plan.command import PlanConfig, run_plan

    return run_plan(parse_arguments(argv, PlanConfig, prog="megatron-mimo plan"))


def _checkpoint(argv: Sequence[str]) -> int:
    return _dispatch("megatron-mimo checkpoint", _CHECKPOINT_COMMANDS, argv)


def _inspect(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.checkpoint.inspect import InspectConfig, run_inspect

    prog = "megatron-mimo checkpoint inspect PATH"
    paths = [token for token in argv if not token.startswith("-")]
    flags = [token for token in argv if token.startswith("-")]
    config = parse_arguments(flags, InspectConfig, prog=prog)
    if len(paths) != 1:
        raise ValueError(f"{prog}: expected one PATH, got {len(paths)}")
    return run_inspect(paths[0], config)


def _convert(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.checkpoint.convert import ConvertConfig, run_convert

    # A field cannot have this name.
    source, rest = _take("--from", argv)
    prog = "megatron-mimo checkpoint convert --from PATH"
    return run_convert(source, parse_arguments(rest, ConvertConfig, prog=prog))


def _take(flag: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of a flag, and the other arguments."""
    value: str | None = None
    rest: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        if token == flag:
            value = next(tokens, None)
            if value is None or value.startswith("--"):
                raise ValueError(f"{flag} has no value: expected text")
        elif token.startswith(f"{flag}="):
            value = token.removeprefix(f"{flag}=")
        else:
            rest.append(token)
    return value, rest


_DATA_COMMANDS: dict[str, tuple[str, Command]] = {
    "prepare": ("make a dataset of a folder, a JSONL or JSON file, or tar shards", _prepare),
    "inspect": ("show a dataset as the model will see it", _inspect_data),
    "digits": ("write a dataset of handwritten digits to try things on", _digits),
}
_CHECKPOINT_COMMANDS: dict[str, tuple[str, Command]] = {
    "inspect": ("show what a checkpoint holds", _inspect),
    "convert": ("convert weights to and from nemotron_h_omni folders", _convert),
}
_COMMANDS: dict[str, tuple[str, Command]] = {
    "train": ("train a model", _train),
    "demo": ("train a small model on digits, on two grids, and report", _demo),
    "data": ("write datasets, and look at them", _data),
    "plan": ("show what each rank of a layout does in a step", _plan),
    "checkpoint": ("look into checkpoints, and convert them", _checkpoint),
    "report": ("make one HTML page of a run", _report),
    "parity": ("compare the curves or the activations of two runs", _parity),
}

if __name__ == "__main__":
    sys.exit(main())
