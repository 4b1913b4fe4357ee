"""The border between a user's file and a library that reads it.

Libraries raise nearly anything over a file that is damaged or of another kind. What leaves a border
is one line of ours, which names the file and what to do; the library's own error is its cause, and
`--traceback` shows both.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

TRACEBACK_FLAG = "--traceback"
_TRACEBACK = "MIMO_TRACEBACK"
_LONGEST = 400  # characters
_SENTENCE = 3  # words


@contextmanager
def border(describe: Callable[[str], str]) -> Iterator[None]:
    """Turn whatever a library raises inside of the block into one line.

    The block holds the library's calls only: errors of this package inside of it would be taken for
    the library's.

    Args:
        describe: Function from the library's reason to the line.

    Raises:
        ValueError: The library raised an error. Exits and interrupts pass.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(describe(reason_of(error))) from error


def reason_of(error: BaseException) -> str:
    """An error as a part of one line: its message, with its type where that says little."""
    said, name, known = str(error), type(error).__name__, isinstance(error, ValueError)
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f": {error.filename}"
        said, known = f"{error.strerror}{where}", True
    words = " ".join(said.split())
    if not words:
        words = name
    elif not known:
        words = f"{name}: {words}"
    if len(words) > _LONGEST:
        words = f"{words[: _LONGEST - 3]}..."
    return printable(words)


def printable(text: str) -> str:
    """A text that every stream takes: halves of surrogate pairs are written as escapes."""
    return text.encode(errors="backslashreplace").decode()


def take_traceback_flag(argv: Sequence[str]) -> list[str]:
    """The arguments without `--traceback`, which holds from now on, in child processes too."""
    if TRACEBACK_FLAG in argv:
        os.environ[_TRACEBACK] = "1"
    return [argument for argument in argv if argument != TRACEBACK_FLAG]


def shows_tracebacks() -> bool:
    """Whether `--traceback` is given."""
    return bool(os.environ.get(_TRACEBACK))


def show_traceback(error: BaseException) -> None:
    """Write to standard error where an error was raised, if `--traceback` is given."""
    if shows_tracebacks():
        sys.stderr.write(printable("".join(traceback.format_exception(error))))
