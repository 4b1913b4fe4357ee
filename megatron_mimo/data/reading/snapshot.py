"""State of a virtual worker as text, and that of earlier versions, which was a pickle."""

from collections.abc import Mapping
from typing import Any

from megatron.energon.flavors.webdataset.sample_loader import SliceState

from megatron_mimo.data.reading import plain
from megatron_mimo.weights.pickled import Name, Record, read_pickle

_RECORDS = {"SliceState": SliceState}
_KINDS: Mapping[Name, type] = {
    ("megatron.energon.state", "FlexState"): dict,
    ("megatron.energon.flavors.webdataset.sample_loader", "SliceState"): Record,
}


def write_snapshot(drawn: int, state: Mapping[str, Any]) -> str:
    """Number of outcomes so far, and energon's state, as text.

    Raises:
        TypeError: Energon's state holds a type that could not be read again.
    """
    return plain.encode((drawn, state), _RECORDS)


def read_snapshot(text: str) -> tuple[int, dict[str, Any]]:
    """What `write_snapshot` wrote.

    Raises:
        ValueError: The text is damaged.
    """
    match plain.decode(text, _RECORDS):
        case (int() as drawn, dict() as state):
            return drawn, state
    raise ValueError("not a stored state: expected a number and a state")


def from_pickle(content: bytes, where: str, *, trust: bool = False) -> str:
    """The text for a state of an earlier version.

    Args:
        content: Pickle of a number and a state.
        where: File, for error messages.
        trust: Whether it may run code.

    Raises:
        ValueError: The pickle is damaged, or names code; the message names the file.
    """
    match _rebuilt(read_pickle(content, _KINDS, {}, where=where, trust=trust)):
        case (int() as drawn, dict() as state):
            try:
                return write_snapshot(drawn, state)
            except TypeError as error:
                raise ValueError(f"{where} cannot be read: {error}") from error
    raise ValueError(f"{where} cannot be read: it holds no state of a reader")


def _rebuilt(value: Any) -> Any:
    if isinstance(value, Record):
        match value.state:
            # As a dataclass with slots is stored.
            case (None, {"index": int() as index, "current": int() as current}):
                return SliceState(index=index, current=current)
        return value
    if isinstance(value, dict):
        return {key: _rebuilt(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rebuilt(item) for item in value]
    return tuple(_rebuilt(item) for item in value) if isinstance(value, tuple) else value
