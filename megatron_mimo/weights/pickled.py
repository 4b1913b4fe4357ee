"""Pickles of other programs, read without running what they name.

A pickle names classes and functions, which `pickle.loads` imports and calls. Here each name is
looked up in a list, and stands for an inert record; nothing is imported and nothing is called. An
error tells the names that are not on the list.
"""

import pickle
from collections.abc import Mapping
from io import BytesIO
from typing import Any, NoReturn

type Name = tuple[str, str]
"""Module and name, as a pickle has them."""


class NamesCodeError(ValueError):
    """A file names code that reading it would run."""


class Record:
    """An object of a pickle: what it was made of, and nothing that it could do.

    Attributes:
        args: Arguments with which it was made.
        state: State that was set afterwards; None for none.
    """

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> "Record":
        """Keep the arguments."""
        made = super().__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state


def read_pickle(
    content: bytes,
    kinds: Mapping[Name, type],
    constants: Mapping[Name, Any],
    *,
    where: str,
    trust: bool = False,
) -> Any:
    """Read a pickle.

    Args:
        content: Bytes of the pickle.
        kinds: Name -> what objects of that name become: a `Record`, or a container such as dict. A
            class is made of it for this pickle alone, so that nothing else can be changed by it.
        constants: Name -> the value that it stands for.
        where: File, for error messages.
        trust: Whether other names are imported, and called, as `pickle.loads` does.

    Raises:
        NamesCodeError: The pickle names something else; the message lists it.
        ValueError: The pickle is damaged.
    """
    reader = _Reader(BytesIO(content), kinds, constants, trust=trust)
    try:
        found = reader.load()
    except Exception as error:
        if not reader.refused:
            raise unreadable(where, error) from error
        found = None
    if reader.refused:
        refuse(where, reader.refused)
    return found


def refuse(where: str, names: set[str]) -> NoReturn:
    """Raise the error for a file that names code.

    Raises:
        NamesCodeError: Always.
    """
    listed = sorted(names)
    shown = ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
    raise NamesCodeError(
        f"{where} names {shown}, which reading it would run: expected tensors and plain values; if "
        f"you trust whoever wrote the file, --trust-checkpoint runs it"
    )


def unreadable(where: str, error: Exception) -> ValueError:
    """The error for a file that is damaged, as one line."""
    # What torch says of it may be many lines long, and a damaged name is not text.
    first = ascii(str(error).strip().partition("\n")[0][:200])[1:-1]
    return ValueError(f"{where} cannot be read ({type(error).__name__}: {first})")


class _Reader(pickle._Unpickler):
    """The one in Python: that in C sets aside as much memory as a few damaged bytes ask for."""

    def __init__(
        self,
        content: BytesIO,
        kinds: Mapping[Name, type],
        constants: Mapping[Name, Any],
        *,
        trust: bool,
    ) -> None:
        super().__init__(content)
        self.refused: set[str] = set()
        self._kinds = kinds
        self._constants = constants
        self._trust = trust
        self._made: dict[Name, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for."""
        key = (module, name)
        if key in self._constants:
            return self._constants[key]
        if key not in self._kinds and self._trust:
            return super().find_class(module, name)
        if key not in self._kinds:
            self.refused.add(ascii(f"{module}.{name}"[:100])[1:-1])
        if key not in self._made:
            kind = self._kinds.get(key, Record)
            self._made[key] = type(kind.__name__, (kind,), {})
        return self._made[key]
