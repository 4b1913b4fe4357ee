"""The interface of a service for curves, and what it is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

CLOSE_S = 50.0
"""Seconds that a service may take for what is left when a run ends."""

_LONGEST_TEXT = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """A start of the run, as a service is told of it.

    Attributes:
        iteration: Last iteration before this start; 0 for a new run.
        flags: Value of every flag by its name.
        facts: Further facts by name, such as the layout and versions.
    """

    iteration: int
    flags: Mapping[str, Any]
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Scalars of one iteration.

    Attributes:
        iteration: Number of the iteration.
        samples: Number of samples trained on so far.
        seconds: Time of the row, in seconds since 1970.
        scalars: Values by TensorBoard tag.
    """

    iteration: int
    samples: int
    seconds: float
    scalars: Mapping[str, float]


class Refused(Exception):
    """A service cannot be used; the message is one line that says what to do."""


class Service(Protocol):
    """One service. Its methods are called in this order, `log` any number of times.

    Whatever the package of a service raises may leave `log` and `close`.
    """

    @property
    def identity(self) -> Mapping[str, str | None]:
        """Settings that name the run; a run goes on under its id only while they are the same."""
        ...

    def check(self) -> None:
        """See that the package is there, and that the service can be reached and lets us in.

        Raises:
            Refused: It is not so.
        """
        ...

    def open(self, start: Start, run_id: str | None) -> tuple[str, str]:
        """Begin a run.

        Args:
            start: Start to record.
            run_id: Id of a run to go on with; None for a new one.

        Returns:
            Id of the run, and one line that says where it can be seen.

        Raises:
            Refused: The run cannot be begun.
        """
        ...

    def log(self, row: Row) -> None:
        """Record scalars; a row is either recorded as a whole or can be given again."""
        ...

    def close(self, *, failed: bool) -> None:
        """End the run within about `CLOSE_S` seconds.

        Args:
            failed: Whether the run ended before its time.
        """
        ...


def one_line(error: BaseException) -> str:
    """What an error says, on one line that is not too long for a terminal.

    Of errors over an error of the system, such as a refused connection, that one says most.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            error = cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ..."


def missing(flag: str, extra: str, error: ImportError) -> Refused:
    """The error for a package that is not installed.

    Args:
        flag: Flag that asks for the service.
        extra: Extra of this package that brings it.
        error: Failed import.
    """
    return Refused(
        f"{flag} needs packages that are not installed ({one_line(error)}): "
        f"pip install 'megatron-mimo[{extra}]', or train without the flag"
    )
