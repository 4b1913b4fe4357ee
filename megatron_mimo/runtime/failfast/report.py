"""What is known about a failure, as text for people and as a record for torchrun."""

import json
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

EXIT_FAILED = 1
EXIT_USAGE = 2

_WIDTH = 78
_TRACEBACK_LIMIT = 16_000  # characters; fits the buffer of a socket
_UNKNOWN_TIME = 4_102_444_800  # 2100-01-01: later than any failure whose time is known
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
    DIED = "died"  # the process ended without a word
    STOPPED = "stopped"  # the process stands still (SIGSTOP)
    SILENT = "silent"  # the rank's watcher no longer answers: machine or network lost
    LAUNCHER = "launcher"  # the process that started the rank is gone


_HINTS = {
    Kind.DIED: "It left no traceback. Where nobody killed it, look for out of memory: dmesg.",
    Kind.STOPPED: "A stopped process leaves no traceback. Start with MIMO_FAILFAST=0 to debug it.",
    Kind.SILENT: "It left no traceback here. Its own machine's log may have one.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureReport:
    """One rank's failure.

    Attributes:
        kind: How it failed.
        rank: Global rank.
        role: What the rank was, such as `encoder dp 0 tp 1`.
        host: The machine's name.
        summary: One line or more: the exception's type and message, or what was seen.
        traceback: Python's traceback, or "" when there is none.
        seconds: When, in seconds since 1970, by the clock of the rank's machine.
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
        """Whether this looks like the effect of another rank's end, such as a lost connection."""
        return self.kind is Kind.EXCEPTION and bool(_CONSEQUENCE.search(self.summary))

    @property
    def exit_code(self) -> int:
        """What the run exits with when this is its first failure."""
        return EXIT_USAGE if self.kind is Kind.USAGE else EXIT_FAILED

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them."""
        return asdict(replace(self, traceback=_shorten(self.traceback)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(**{**values, "kind": Kind(values["kind"])})


def render(first: FailureReport) -> str:
    """The block that stands last on the screen."""
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
    """What a rank says that ends because another one failed."""
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
    """The report of a rank that ended without a word.

    Args:
        rank: Global rank.
        role: Its role.
        host: Its machine.
        seconds: See `FailureReport`.
        exit_code: Negative for a signal; None if nobody knows.
        crash: What faulthandler wrote.
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
    """The report of a death of which only the launcher knows how it came; others stay.

    Args:
        report: Of any failure.
        exit_code: Of its rank's process, negative for a signal.
    """
    if report.summary != _NOBODY_KNOWS:
        return report
    return died(report.rank, report.role, report.host, report.seconds, exit_code=exit_code)


def write_record(path: str, first: FailureReport, *, rank: int, role: str, host: str) -> None:
    """Tell torchrun, through the file that it names in TORCHELASTIC_ERROR_FILE.

    torchrun shows the oldest record of all failed ranks as the root cause; of several of the same
    second, that of the rank whose end it noticed first. It reads a record as soon as it notices.

    Args:
        path: The file; "" where no torchrun waits for one.
        first: The run's first failure.
        rank: Global rank that the file belongs to. One that ended because of the first failure
            writes a younger time.
        role: Its role.
        host: Its machine.
    """
    text = render(first) if first.kind is Kind.USAGE else _describe(first, "failed first")
    seconds = int(first.seconds)
    if first.rank != rank:
        seconds = 1 + (_UNKNOWN_TIME if first.kind is Kind.DIED else seconds)
        # Another machine's torchrun sees only its own ranks' files.
        text = farewell(rank, role, first) + ("" if first.host == host else f"\n{text}")
    _write(path, first, text, seconds)


def write_own_record(path: str, report: FailureReport, *, maybe_ended: bool) -> None:
    """Write what this rank knows before all know who was first, since torchrun may read it now.

    Args:
        path: The file.
        report: This rank's failure.
        maybe_ended: It died in a way that may be torchrun's doing, after another rank's failure.
    """
    seconds = _UNKNOWN_TIME if maybe_ended else int(report.seconds)
    _write(path, report, _describe(report, "failed"), seconds)


def write_record_ahead(path: str, report: FailureReport) -> None:
    """Write the record of a death that has not happened: who is killed cannot write one.

    Its time is in the far future, so that any record of a failure that was seen is older.
    """
    _write(path, report, _describe(report, "ended without a report"), _UNKNOWN_TIME, ahead=True)


def read_record(record: Mapping[str, Any]) -> FailureReport | None:
    """The run's first failure out of a record's content; None if others wrote the record."""
    message = record.get("message")
    extra = message.get("extraInfo", {}) if isinstance(message, dict) else {}
    return FailureReport.from_json(extra[_RECORD_KEY]) if _RECORD_KEY in extra else None


def is_ahead(record: Mapping[str, Any]) -> bool:
    """Whether nobody has yet replaced what `write_record_ahead` wrote."""
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
        # torchrun has gone and taken its folder along, or the disk is full: nothing to add.
        partial.unlink(missing_ok=True)


def _shorten(text: str) -> str:
    if len(text) <= _TRACEBACK_LIMIT:
        return text
    half = _TRACEBACK_LIMIT // 2
    return f"{text[:half]}\n  ... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
