"""Plain values as text, and back exactly."""

import json
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.reading import plain
from tests.properties import examples


@dataclass(kw_only=True, slots=True)
class Slice:
    """A dataclass that both sides know."""

    index: int
    current: int


RECORDS = {"Slice": Slice}
_KEYS = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5)
_LEAVES = (
    _KEYS
    | st.floats(allow_nan=False)
    | st.builds(Slice, index=st.integers(), current=st.integers())
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(_KEYS | st.tuples(_KEYS, _KEYS), inner, max_size=4)
    ),
    max_leaves=30,
)


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@examples(500)
@given(VALUES)
def test_values_come_back_exactly(value: Any) -> None:
    text = plain.encode(value, RECORDS)
    assert same(plain.decode(text, RECORDS), value)
    # Any reader of JSON reads it.
    json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_what_would_not_be_the_same_is_refused() -> None:
    for value, name in ((object(), "builtins.object"), ({1: {2}}, "set"), (1j, "complex")):
        with pytest.raises(TypeError, match=f"a state holds a .*{name}: expected plain values"):
            plain.encode(value)
    with pytest.raises(TypeError, match=r"Slice: expected plain values$"):
        plain.encode(Slice(index=1, current=2))
    assert math.isnan(plain.decode(plain.encode(math.nan)))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"tuple": 1}', '{"dict": [[1]]}', '{"dict": [[[], 1]]}', "{}",
     '{"bytes": "?"}', '{"bytes": 1}', '{"record": "os.system", "of": {"command": "true"}}',
     '{"record": "Slice", "of": {"x": 1}}', '{"record": "Slice", "of": []}',
     '{"float": "__import__"}', '{"a\\nb": 1}', '{"\\ud800": 1}'],
)  # fmt: skip
def test_damage_is_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"\Anot a stored state \(.*\)\Z") as error:
        plain.decode(text, RECORDS)
    str(error.value).encode()


@examples(500)
@given(VALUES, st.integers())
def test_damaged_texts_are_values_or_one_line(value: Any, seed: int) -> None:
    chance = random.Random(seed)
    text = bytearray(plain.encode(value, RECORDS).encode())
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(text) + 1)
        text[at : at + chance.randint(0, 2)] = chance.choice([b"", b"[", b'"', b"9", b"\xff", b"}"])
    try:
        plain.decode(text.decode(errors="replace"), RECORDS)
    except ValueError as error:
        assert "\n" not in str(error)
