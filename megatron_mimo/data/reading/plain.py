"""Plain values as JSON text, exactly: a tuple stays a tuple, and a number is a key as it was.

None, truth values, whole and finite numbers, texts and lists are JSON's own. Others are an object
with one form of this table.

| form | value |
|---|---|
| `{"tuple": [1, 2]}` | a tuple |
| `{"dict": [["a", 1], [2, "b"]]}` | a dict, in its order |
| `{"bytes": "AAEC"}` | bytes, in base64 |
| `{"float": "nan"}` | a number that JSON has not |
| `{"record": "Slice", "of": {"index": 3}}` | a dataclass that both sides know, by its fields |
"""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def encode(value: Any, records: Mapping[str, type] | None = None) -> str:
    """Value as JSON text.

    Args:
        value: Value of the types above.
        records: Dataclasses that may be in it, by name.

    Raises:
        TypeError: A value is of another type, which would not be the same afterwards.
    """
    names = {kind: name for name, kind in (records or {}).items()}
    return json.dumps(_encoded(value, names), separators=(",", ":"), allow_nan=False)


def decode(text: str, records: Mapping[str, type] | None = None) -> Any:
    """Value that `encode` made a text of.

    Args:
        text: The text.
        records: Dataclasses that may be in it, by name.

    Raises:
        ValueError: The text is damaged, or names another dataclass.
    """
    try:
        return _decoded(json.loads(text), records or {})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        first = ascii(str(error)[:200])[1:-1]
        raise ValueError(f"not a stored state ({type(error).__name__}: {first})") from error


def _encoded(value: Any, names: Mapping[type, str]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is tuple:
        return {"tuple": [_encoded(item, names) for item in value]}
    if kind is list:
        return [_encoded(item, names) for item in value]
    if isinstance(value, dict):
        # Energon's states are dicts by another name.
        return {"dict": [[_encoded(k, names), _encoded(v, names)] for k, v in value.items()]}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind in names:
        of = {field.name: _encoded(getattr(value, field.name), names) for field in fields(value)}
        return {"record": names[kind], "of": of}
    raise TypeError(
        f"a state holds a {kind.__module__}.{kind.__qualname__}: expected plain values"
        + (f", or one of {', '.join(names.values())}" if names else "")
    )


def _decoded(found: Any, records: Mapping[str, type]) -> Any:
    if isinstance(found, list):
        return [_decoded(item, records) for item in found]
    if not isinstance(found, dict):
        return found
    match found:
        case {"tuple": list(items)}:
            return tuple([_decoded(item, records) for item in items])
        case {"dict": list(pairs)}:
            return {_decoded(k, records): _decoded(v, records) for k, v in pairs}
        case {"bytes": str(text)}:
            return base64.b64decode(text, validate=True)
        case {"float": "nan" | "inf" | "-inf" as text}:
            return float(text)
        case {"record": str(name), "of": dict(of)} if name in records:
            return records[name](**{field: _decoded(item, records) for field, item in of.items()})
    raise ValueError(f"unknown form {', '.join(map(str, found))}")
