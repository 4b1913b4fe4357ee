"""What is known about a failure, as text for people and as a record for torchrun."""

import json
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

EXIT_FAILED = 1
EXIT_USAGE = 2

_WIDTH = 78
_TRACEBACK_LIMIT = 16_000  # characters; fits the buffer of a socket
_SUMMARY_LIMIT = 4_000
_NAME_LIMIT = 300  # of a role or a host
_UNKNOWN_TIME = 4_102_444_800  # 2100-01-01: later than any failure whose time is known
_MOST_RANKS = 1_000_000_000
_RECORD_KEY = "megatron_mimo"
_AHEAD_KEY = "megatron_mimo_ahead"
_NOBODY_KNOWS = "killed by a signal (kill -9, out of memory) or os._exit"
_OWN_THREAD = "in _obey"  # the thread of `guard_rank`, of no interest in a crash

_CONSEQUENCE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|connection to .*(closed|lost)"
    r"|broken pipe|closed by (remote )?peer|socket ?(closed|timeout|error)|timed out|timeout"
    r"|remote process exited|ncclRemoteError|NCCL communicator was aborted"
    r"|failed to (send|recv|connect)",
    re.IGNORECASE,
)


class Kind(StrEnum):
    """How a rank failed."""

    EXCEPTION = "exception"  # an exception left the guarded code
    USAGE = "usage"  # the user's input is wrong: the message says it all
    DIED = "died"  # the process ended without a report
    STOPPED = "stopped"  # the process is stopped (SIGSTOP)
    SILENT = "silent"  # the rank's watcher no longer answers: machine or network lost
    LAUNCHER = "launcher"  # the process that started the rank has ended


_HINTS = {
    Kind.DIED: "It left no traceback. Where nobody killed it, look for out of memory: dmesg.",
    Kind.STOPPED: "A stopped process leaves no traceback. Start with MIMO_FAILFAST=0 to debug it.",
    Kind.SILENT: "It left no traceback here. Its own machine's log may have one.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureReport:
    """One rank's failure.

    Attributes:
        kind: Way in which the rank failed.
        rank: Global rank that failed.
        role: Description of the rank, such as `encoder dp 0 tp 1`.
        host: Name of the machine.
        summary: One line or more: the exception's type and message, or what was observed.
        traceback: Python's traceback; "" when there is none.
        seconds: Time of the failure in seconds since 1970, by the clock of the rank's machine.
    """

    kind: Kind
    rank: int
    role: str
    host: str
    summary: str
    traceback: str = ""
    seconds: float

    @property
    def is_consequence(self) -> bool:
        """Whether this looks like an effect of another rank's end, such as a lost connection."""
        return self.kind is Kind.EXCEPTION and bool(_CONSEQUENCE.search(self.summary))

    @property
    def exit_code(self) -> int:
        """Exit code of the run when this is its first failure."""
        return EXIT_USAGE if self.kind is Kind.USAGE else EXIT_FAILED

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold; `from_json` reads them."""
        return asdict(
            replace(
                self,
                role=self.role[:_NAME_LIMIT],
                host=self.host[:_NAME_LIMIT],
                summary=_shorten(self.summary, _SUMMARY_LIMIT),
                traceback=_shorten(self.traceback, _TRACEBACK_LIMIT),
            )
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: It did not write that.
        """
        if not isinstance(values, Mapping) or set(values) != {field.name for field in fields(cls)}:
            raise ValueError("not a report of a failure")
        texts = {name: values[name] for name in ("role", "host", "summary", "traceback")}
        rank, seconds = values["rank"], values["seconds"]
        if not (
            isinstance(values["kind"], str)
            and values["kind"] in set(Kind)
            and type(rank) is int
            and 0 <= rank < _MOST_RANKS
            and type(seconds) in (int, float)
            and 0 <= seconds <= _UNKNOWN_TIME
            and all(isinstance(text, str) for text in texts.values())
        ):
            raise ValueError("not a report of a failure")
        return cls(kind=Kind(values["kind"]), rank=rank, seconds=seconds, **texts)


def render(first: FailureReport) -> str:
    """Text of the first failure, which is printed last."""
    if first.kind is Kind.USAGE:
        return f"error: {first.summary}"
    text = _describe(first, "failed first").split("\n", 1)
    return "\n".join(
        ["=" * _WIDTH, text[0], *(["-" * _WIDTH] if text[1:] else []), *text[1:], "=" * _WIDTH]
    )


def _describe(report: FailureReport, what: str) -> str:
    """A line that names rank and cause, then the traceback if there is one."""
    cause, _, rest = report.summary.partition("\n")
    line = f"rank {report.rank} ({report.role}) on {report.host} {what}: {cause}"
    text = report.traceback.rstrip() or rest or _HINTS.get(report.kind, "")
    return "\n".join(part for part in (line, text) if part)


def farewell(rank: int, role: str, first: FailureReport) -> str:
    """Message of a rank that ends because another rank failed."""
    cause = first.summary.partition("\n")[0]
    return f"rank {rank} ({role}) ends, because rank {first.rank} ({first.role}) failed: {cause}"


def died(
    rank: int,
    role: str,
    host: str,
    seconds: float,
    *,
    exit_code: int | None = None,
    crash: str = "",
) -> FailureReport:
    """The report of a rank whose process ended without a report of its own.

    Args:
        rank: Global rank.
        role: Description of the rank.
        host: Name of its machine.
        seconds: Time of the failure, as in `FailureReport`.
        exit_code: Exit code of the process, negative for a signal; None where it is unknown.
        crash: Text that faulthandler wrote, "" for none.
    """
    summary = _NOBODY_KNOWS
    if crash:
        summary = crash.partition("\n")[0]
    elif exit_code is not None and exit_code < 0:
        summary = f"killed by signal {-exit_code} ({_signal_name(-exit_code)})"
    elif exit_code is not None:
        summary = f"ended with exit code {exit_code} and without an exception"
    blocks = [
        block
        for block in crash.strip().split("\n\n")
        if _OWN_THREAD not in block and not block.startswith("Extension modules: ")
    ]
    return FailureReport(
        kind=Kind.DIED,
        rank=rank,
        role=role,
        host=host,
        summary=summary,
        traceback="\n\n".join(blocks),
        seconds=seconds,
    )


def with_exit_code(report: FailureReport, exit_code: int) -> FailureReport:
    """Add the exit code, known to the launcher alone, to the report of a death.

    Args:
        report: Report of any failure; one that states already how its rank ended is returned
            unchanged.
        exit_code: Exit code of the rank's process, negative for a signal.
    """
    if report.summary != _NOBODY_KNOWS:
        return report
    return died(report.rank, report.role, report.host, report.seconds, exit_code=exit_code)


def write_record(path: str, first: FailureReport, *, rank: int, role: str, host: str) -> None:
    """Report a failure to torchrun, through the file that TORCHELASTIC_ERROR_FILE names.

    torchrun shows the oldest record of all failed ranks as the root cause; of several of the same
    second, that of the rank whose end it noticed first. It reads a record as soon as it notices.

    Args:
        path: Path to the file; "" where torchrun did not start this process.
        first: The run's first failure.
        rank: Global rank that the file belongs to. A rank that ended because of the first failure
            writes a later time.
        role: Description of that rank.
        host: Name of its machine.
    """
    text = render(first) if first.kind is Kind.USAGE else _describe(first, "failed first")
    seconds = int(first.seconds)
    if first.rank != rank:
        seconds = 1 + (_UNKNOWN_TIME if first.kind is Kind.DIED else seconds)
        # Another machine's torchrun sees only its own ranks' files.
        text = farewell(rank, role, first) + ("" if first.host == host else f"\n{text}")
    _write(path, first, text, seconds)


def write_own_record(path: str, report: FailureReport, *, maybe_ended: bool) -> None:
    """Write this rank's failure before the first one is known: torchrun may read it at once.

    Args:
        path: Path to the file.
        report: This rank's failure.
        maybe_ended: Whether torchrun may have ended the rank, after another rank's failure.
    """
    seconds = _UNKNOWN_TIME if maybe_ended else int(report.seconds)
    _write(path, report, _describe(report, "failed"), seconds)


def write_record_ahead(path: str, report: FailureReport) -> None:
    """Write the record of a death in advance, since a killed process cannot write one.

    Its time is in the far future, so that any record of a failure that was seen is older.
    """
    _write(path, report, _describe(report, "ended without a report"), _UNKNOWN_TIME, ahead=True)


def read_record(record: Mapping[str, Any]) -> FailureReport | None:
    """The run's first failure from a record; None if another program wrote the record."""
    message = record.get("message")
    extra = message.get("extraInfo", {}) if isinstance(message, dict) else {}
    return FailureReport.from_json(extra[_RECORD_KEY]) if _RECORD_KEY in extra else None


def is_ahead(record: Mapping[str, Any]) -> bool:
    """Whether a record is still the one that `write_record_ahead` wrote."""
    message = record.get("message")
    return isinstance(message, dict) and bool(message.get("extraInfo", {}).get(_AHEAD_KEY))


def _write(
    path: str, report: FailureReport, text: str, seconds: int, *, ahead: bool = False
) -> None:
    if not path:
        return
    extra = {
        "py_callstack": text,
        "timestamp": str(seconds),
        _RECORD_KEY: report.to_json(),
        _AHEAD_KEY: ahead,
    }
    record = {"message": {"message": report.summary, "extraInfo": extra}}
    partial = Path(f"{path}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(record))
        partial.replace(path)
    except OSError:
        # torchrun has ended and removed its folder, or the disk is full: nothing can be done.
        partial.unlink(missing_ok=True)


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n  ... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
