"""The command `megatron-mimo`. Each subcommand imports what it needs, so that help is fast."""

from megatron_mimo import interrupts  # first: an interrupt is quiet from here on

# isort: split
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import arg

from megatron_mimo import __version__
from megatron_mimo.border import printable, reason_of, show_traceback, take_traceback_flag
from megatron_mimo.config.arguments import (
    known_flags,
    nearest,
    parse_arguments,
    show_help,
    without_flags,
)
from megatron_mimo.config.flags import CommandLine, parse, to_yaml
from megatron_mimo.settings import Within

_FAILED, _WRONG_USAGE = 1, 2

Command = Callable[[Sequence[str]], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainCommandLine(CommandLine):
    """Train a multimodal model whose modules live on separate process grids.

    Attributes:
        nproc: Number of ranks to start on this machine; left out: this process is a rank, as under
            torchrun or srun.
    """

    nproc: Annotated[int | None, arg(metavar="N", help_behavior_hint=""), Within(1, 65_536)] = (
        field(default=None)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the program's name; the process's own when None.

    Returns:
        The exit code: 0 for success, 1 for a failed run or a fault of the machine, 2 for wrong
        usage, 3 for failed parity, 130 when it was interrupted.
    """
    argv = take_traceback_flag(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # Names of files need not be valid Unicode.
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return _dispatch("megatron-mimo", _COMMANDS, argv)
    except ValueError as error:
        show_traceback(error)
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return _WRONG_USAGE
    except BrokenPipeError:
        # Whoever read the output has seen enough; flushing the rest would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _FAILED
    except OSError as error:
        show_traceback(error)
        print(f"error: {reason_of(error)}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        return interrupts.EXIT_INTERRUPTED


def _dispatch(prog: str, commands: dict[str, tuple[str, Command]], argv: Sequence[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: {prog} COMMAND [flags]\n")
        for command, (text, _) in commands.items():
            print(f"  {command:<12}{text}")
        print(
            f"\n`{prog} COMMAND --help` lists the flags of a command. With --traceback, an error "
            f"also shows\nwhere in the code it was raised."
        )
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
    from megatron_mimo.config.resolve import check_paths, resolve

    # Once here, so that a wrong flag starts no ranks.
    resolved = resolve(line.train, line.nproc)
    if line.print_config:
        sys.stdout.write(to_yaml(resolved.config))
        return 0
    check_paths(resolved)
    from megatron_mimo.training.files import check_open_files

    for rank in range(line.nproc):
        check_open_files(resolved, rank)
    from megatron_mimo.launch.preload import can_fork
    from megatron_mimo.launch.ranks import launch

    fork = can_fork(resolved.runtime.device)
    return launch(
        line.nproc, without_flags(argv, ("--nproc",)), "megatron_mimo.training", fork=fork
    )


def _demo(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.demo.command import DemoConfig, run_demo

    return run_demo(parse_arguments(argv, DemoConfig, prog="megatron-mimo demo"))


def _demo_omni(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.demo.omni import OmniDemoConfig, run_omni_demo

    return run_omni_demo(parse_arguments(argv, OmniDemoConfig, prog="megatron-mimo demo-omni"))


def _data(argv: Sequence[str]) -> int:
    return _dispatch("megatron-mimo data", _DATA_COMMANDS, argv)


def _digits(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.data.digits import DigitsCommandLine, run_digits

    return run_digits(parse_arguments(argv, DigitsCommandLine, prog="megatron-mimo data digits"))


def _omni_digits(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.data.omni_digits import OmniDigitsCommandLine, run_omni_digits

    prog = "megatron-mimo data omni-digits"
    return run_omni_digits(parse_arguments(argv, OmniDigitsCommandLine, prog=prog))


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


def _bench_data(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.data.bench import BenchCommandLine, run_bench

    prog = "megatron-mimo data bench DATASET"
    path, rest = _positional("DATASET", argv, BenchCommandLine, prog)
    return run_bench(path, parse(rest, BenchCommandLine, prog=prog))


def _positional(name: str, argv: Sequence[str], into: type, prog: str) -> tuple[str, list[str]]:
    """The one argument that is neither flag nor value, and the others; prints help if asked."""
    (found,), rest = _positionals((name,), argv, into, prog)
    return found, rest


def _positionals(
    names: Sequence[str], argv: Sequence[str], into: type, prog: str
) -> tuple[list[str], list[str]]:
    """The arguments that are neither flags nor values, and the others; prints help if asked.

    Raises:
        ValueError: There are more or fewer, or a flag is unknown.
    """
    found, rest = _split(argv, into, prog)
    if len(found) != len(names):
        shown = f" ({', '.join(found)})" if found else ""
        wanted = f"one {names[0]}" if len(names) == 1 else " and ".join(names)
        raise ValueError(f"{prog}: expected {wanted}, got {len(found)}{shown}")
    return found, rest


def _split(argv: Sequence[str], into: type, prog: str) -> tuple[list[str], list[str]]:
    """Arguments that are neither flags nor values, however many, and the others."""
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


def _generate(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.generate.command import run_generate
    from megatron_mimo.tools.generate.config import GenerateConfig

    prog = "megatron-mimo generate RUN QUESTION"
    found, rest = _split(argv, GenerateConfig, prog)
    config = parse_arguments(rest, GenerateConfig, prog=prog)
    if not 1 <= len(found) <= 2:
        # Of a question without quotes every word is one.
        shown = " ".join(found[1:])
        hint = f'; put the question in quotes, as in "{shown}"' if found else ""
        raise ValueError(f"{prog}: expected RUN and QUESTION, got {len(found)}{hint}")
    return run_generate(found[0], found[1] if len(found) == 2 else None, config)


def _chat(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.chat.command import run_chat
    from megatron_mimo.tools.generate.config import ChatConfig

    prog = "megatron-mimo chat RUN"
    run, rest = _positional("RUN", argv, ChatConfig, prog)
    return run_chat(run, parse_arguments(rest, ChatConfig, prog=prog))


def _evaluate(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.evaluate.command import run_evaluate
    from megatron_mimo.tools.evaluate.config import EvaluateConfig

    prog = "megatron-mimo evaluate RUN --data DATASET"
    run, rest = _positional("RUN", argv, EvaluateConfig, prog)
    return run_evaluate(run, parse_arguments(rest, EvaluateConfig, prog=prog))


def _plan(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.plan.dry_run import asks_for_dry_run

    if asks_for_dry_run(argv):
        from megatron_mimo.tools.plan.dry_run.command import run_dry_run

        return run_dry_run(argv)
    from megatron_mimo.tools.plan.command import PlanCommandLine, run_plan

    return run_plan(parse(argv, PlanCommandLine, prog="megatron-mimo plan"))


def _doctor(argv: Sequence[str]) -> int:
    from megatron_mimo.tools.doctor.command import DoctorConfig, run_doctor

    return run_doctor(parse_arguments(argv, DoctorConfig, prog="megatron-mimo doctor"))


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
    "bench": ("measure how fast a dataset can be read here, and what limits it", _bench_data),
    "digits": ("write a dataset of handwritten digits to try things on", _digits),
    "omni-digits": ("write one of pictures, calls and videos of digits", _omni_digits),
}
_CHECKPOINT_COMMANDS: dict[str, tuple[str, Command]] = {
    "inspect": ("show what a checkpoint holds", _inspect),
    "convert": ("convert weights to and from folders of transformers", _convert),
}
_COMMANDS: dict[str, tuple[str, Command]] = {
    "train": ("train a model", _train),
    "demo": ("train a small model on digits, on two grids, and report", _demo),
    "demo-omni": ("the same with pictures, calls and videos, on three grids", _demo_omni),
    "generate": ("let a trained model answer a question", _generate),
    "chat": ("talk with a trained model on a terminal or in a browser", _chat),
    "evaluate": ("score a trained model on a dataset", _evaluate),
    "data": ("write datasets, and look at them", _data),
    "plan": ("show what each rank of a layout does in a step", _plan),
    "checkpoint": ("look into checkpoints, and convert them", _checkpoint),
    "report": ("make one HTML page of a run", _report),
    "parity": ("compare the curves or the activations of two runs", _parity),
    "doctor": ("look at what a run needs of this machine", _doctor),
}

if __name__ == "__main__":
    sys.exit(main())
