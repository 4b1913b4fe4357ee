"""Pickles are read without running what they name."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.weights.pickled import NamesCodeError, Record, read_pickle


class Runs:
    """An object whose pickle runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class Known:
    """An object of a known name, which would do something when it is set."""

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("this is code of the file's class")


def read(content: bytes, **settings: Any) -> Any:
    kinds = {(__name__, "Known"): Record, ("collections", "OrderedDict"): OrderedDict}
    return read_pickle(content, kinds, {("torch", "int8"): 8}, where="FILE", **settings)


def test_plain_values_and_known_names_are_read() -> None:
    value = {"a": (1, 2.5, None), "b": [True, b"x"], "c": OrderedDict(d=4)}
    assert read(pickle.dumps(value)) == value
    assert read(b"ctorch\nint8\n.") == 8
    known = Known()
    known.x = 3  # type: ignore[attr-defined]
    found = read(pickle.dumps(known))
    assert isinstance(found, Record) and found.state == {"x": 3}


def test_a_class_that_a_pickle_changes_is_its_own() -> None:
    """BUILD sets attributes of whatever is on the stack, also of a class."""
    polluting = f"c{__name__}\nKnown\nN}}S'injected'\nI1\ns\x86b.".encode("latin-1")
    for content in (polluting, b"ccollections\nOrderedDict\nN}S'injected'\nI1\ns\x86b."):
        try:
            read(content)
        except ValueError as error:
            assert str(error).startswith("FILE cannot be read")
    for kind in (Record, OrderedDict, Known):
        assert not hasattr(kind, "injected")


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_runs_and_the_error_names_it(protocol: int, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    content = pickle.dumps([1, Runs(f"touch {ran}")], protocol)
    with pytest.raises(NamesCodeError) as error:
        read(content)
    assert str(error.value) == (
        "FILE names posix.system, which reading it would run: expected tensors and plain values; "
        "if you trust whoever wrote the file, --trust-checkpoint runs it"
    )
    assert not ran.exists()
    assert read(content, trust=True) == [1, 0]
    assert ran.exists()


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", b"\x80\x04", b"(" * 100_000, b"\x8e" + b"\xff" * 8, b"I" * 9]
)
def test_damage_is_one_line(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"\AFILE cannot be read \(.*\)\Z"):
        read(content)
