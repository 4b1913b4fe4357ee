"""Start the ranks of one machine with torchrun's engine, and tell how they ended."""

import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_mimo.failfast import EXIT_FAILED, render
from megatron_mimo.failfast.meeting import SECRET, new_secret
from megatron_mimo.failfast.report import is_ahead, read_record, with_exit_code
from megatron_mimo.launch.forked_rank import run_rank

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import LogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

_FORK_SERVER = "megatron_mimo.launch.fork_server"
_LOOPBACKS = ("lo", "lo0")
# All that the engine would handle, but for one, since it must be given some.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Ranks that are told to end may save first.
_SHUTDOWN_LIMIT_S = "60"
_RECORD_LIMIT_S = 2.0

# They announce each signal sent to a rank. The failure itself is what the user needs to see.
_TALKATIVE = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.multiprocessing.spawn",
)


def launch(nproc: int, argv: Sequence[str], target: str, *, fork: bool = False) -> int:
    """Run `target` on `nproc` ranks of this machine and wait for them.

    If a rank fails, all end, and the first failure is the last thing on the screen: rank, role
    and traceback, if the target uses `guard_rank`. See docs/how-to/failures.md.

    Args:
        nproc: Number of ranks.
        argv: Arguments of the target.
        target: Name of a module, or path to a `.py` file.
        fork: Whether to import what training needs once, in a process of its own, and fork the
            ranks from it; only where `can_fork`. Otherwise each rank is an interpreter of its own,
            which takes seconds to import it.

    Returns:
        The exit code: 0 done, 1 failed or interrupted, 2 the user's input was wrong.

    Raises:
        ValueError: `nproc` is not positive, or the file does not exist.
    """
    if nproc < 1:
        raise ValueError(f"--nproc {nproc}: expected at least 1")
    is_file = target.endswith(".py")
    if is_file and not Path(target).is_file():
        raise ValueError(f"there is no file {target} to start")
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _prepare_environment(nproc)
    fork = fork and _lets_us_handle_signals()
    with tempfile.TemporaryDirectory(prefix="megatron-mimo-") as folder:
        config = _configure(nproc, DefaultLogsSpecs(log_dir=folder))
        closing = Path(folder) / "closing"
        entry: Callable[..., None] | str
        arguments: Sequence[Any]
        if fork:
            _quiet_the_tracker()
            os.environ["MIMO_LAUNCHER"] = str(os.getpid())
            multiprocessing.set_forkserver_preload([_FORK_SERVER])
            entry, arguments = run_rank, (target, argv, closing)
        else:
            entry, arguments = sys.executable, ["-u", *([] if is_file else ["-m"]), target, *argv]
        try:
            with _interrupted(closing):
                elastic_launch(config, entry)(*arguments)
        except ChildFailedError as error:
            return _conclude(error)
        except SignalException as error:
            _say(f"stopped by {signal.Signals(error.sigval).name}")
            return EXIT_FAILED
    return 0


@contextmanager
def _interrupted(closing: Path) -> Iterator[None]:
    """End the ranks on a signal, as the engine does, and create `closing` to tell them so."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def interrupt(number: int, _: FrameType | None) -> None:
        closing.touch()
        name = signal.Signals(number)
        raise SignalException(f"the launcher was sent {name.name}", sigval=name)

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quiet_the_tracker() -> None:
    """Silence the warning of the process that cleans up after a killed launcher."""
    filters = [os.environ.get("PYTHONWARNINGS", ""), "ignore:resource_tracker:UserWarning"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, filters))


def _prepare_environment(nproc: int) -> None:
    """Set variables that the ranks inherit; those that the user has set are kept."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_LIMIT_S)
    os.environ.setdefault(SECRET, new_secret())
    # All ranks are on this machine, whose own name need not be known to its resolver.
    interfaces = {name for _, name in socket.if_nameindex()}
    for name in _LOOPBACKS:
        if name in interfaces:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _configure(nproc: int, logs: "LogsSpecs") -> "LaunchConfig":
    """Configuration that `torchrun --standalone` would use."""
    from torch.distributed.launcher.api import LaunchConfig

    ours: dict[str, Any] = {"signals_to_handle": "SIGQUIT"} if _lets_us_handle_signals() else {}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=logs,
        # Of ranks that are a function; interpreters of their own know no other.
        start_method="forkserver",
        **ours,
    )


def _lets_us_handle_signals() -> bool:
    """Whether the engine can be told which signals to leave alone: torch 2.9 and newer."""
    from torch.distributed.launcher.api import LaunchConfig

    return "signals_to_handle" in {field.name for field in fields(LaunchConfig)}


def _conclude(error: "ChildFailedError") -> int:
    """Show the first failure and return the exit code that goes with it."""
    rank, failure = error.get_first_failure()
    first = read_record(_latest_record(failure))
    if first is None:
        how = _how_it_ended(failure)
        _say(f"rank {rank} failed first: {how}, before it could say why. Its output is above.")
        return EXIT_FAILED
    if first.rank == rank:
        # A rank that was forked is waited for before its watcher can ask how it ended.
        first = with_exit_code(first, failure.exitcode)
    _say(render(first))
    return first.exit_code


def _latest_record(failure: "ProcessFailure") -> Mapping[str, Any]:
    """Record that torchrun read when the rank ended, or what its watcher has found out since."""
    record: Mapping[str, Any] = failure.error_file_data
    deadline = time.monotonic() + _RECORD_LIMIT_S
    while is_ahead(record) and time.monotonic() < deadline:
        time.sleep(0.05)
        with suppress(OSError, ValueError):
            record = json.loads(Path(failure.error_file).read_text())
    return record


def _how_it_ended(failure: "ProcessFailure") -> str:
    if failure.exitcode < 0:
        return f"ended by {failure.signal_name()}"
    return f"exit code {failure.exitcode}"


def _say(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
