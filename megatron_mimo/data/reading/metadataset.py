"""Checks of the YAML files of a dataset before energon reads them.

Energon's parser names no line, and takes weights with which its sampling fails later.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_mimo.border import border, reason_of

# Keys whose values say how often a dataset is read.
_POSITIVE = ("weight", "repetitions")
_DEEPEST = 50
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_metadataset(path: Path) -> None:
    """Refuse a metadataset, and those that it names, for what energon would not explain.

    Raises:
        ValueError: A file cannot be read or is not YAML, a weight is not positive, or a metadataset
            is a part of itself; the message names file and line.
    """
    _check(path, ())


def check_folder(folder: Path) -> None:
    """Refuse the metadata of a dataset's folder if they are not YAML.

    Raises:
        ValueError: A file cannot be read, is empty or not YAML; the message names file and line.
    """
    for name in ("dataset.yaml", "split.yaml"):
        file = folder / ".nv-meta" / name
        # Energon takes JSON in place of the latter.
        if name == "dataset.yaml" or file.exists():
            for _ in _settings(file):
                pass


def _check(path: Path, above: tuple[Path, ...]) -> None:
    if path.resolve() in above:
        raise ValueError(f"{path} is a part of itself: a metadataset names only others")
    for line, key, value in _settings(path):
        where = f"{path}:{line}: {key}"
        if key in _POSITIVE and not _is_positive(value):
            raise ValueError(
                f"{where} is {value!r}: expected a number above 0; leave the dataset out if it is "
                f"not to be read"
            )
        if key == "path" and value.endswith(".yaml") and "://" not in value:
            _check(path.parent / value, (*above, path.resolve()))


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _settings(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, key and value of each setting that is one value."""
    with border(lambda why: f"{path} cannot be read: {why}"):
        text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{path} is empty: expected a metadataset or metadata of a dataset")
    # What is open at a place: for each mapping the key that waits for its value, else None.
    waiting: list[str | None] = []
    mappings: list[bool] = []
    events = yaml.parse(text, Loader=_LOADER)
    while (event := _next(events, path)) is not None:
        if isinstance(event, yaml.CollectionEndEvent):
            waiting.pop()
            mappings.pop()
            continue
        line = event.start_mark.line + 1
        begins = isinstance(event, yaml.CollectionStartEvent)
        value = str(getattr(event, "value", ""))
        if (begins or isinstance(event, yaml.NodeEvent)) and mappings and mappings[-1]:
            key = waiting[-1]
            waiting[-1] = value if key is None else None
            if key is not None and isinstance(event, yaml.ScalarEvent):
                yield line, key, value
        if begins:
            waiting.append(None)
            mappings.append(isinstance(event, yaml.MappingStartEvent))
            if len(mappings) > _DEEPEST:
                raise ValueError(
                    f"{path}:{line}: more than {_DEEPEST} levels: no metadata has so many"
                )


def _next(events: Iterator[Any], path: Path) -> Any:
    try:
        return next(events, None)
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        why = getattr(error, "problem", None) or reason_of(error)
        raise ValueError(f"{path}{line} is not YAML: {why}") from error
