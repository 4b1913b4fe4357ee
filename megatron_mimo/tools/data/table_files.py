"""Rows of parquet and arrow files, a few in memory at a time. What reads the files is pyarrow."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mimo.border import border, reason_of
from megatron_mimo.data.samples.media import shortened
from megatron_mimo.tools.data.columns import BINARY, NOTHING, NUMBER, TEXT, Column, Form

# Of a row group of parquet, which may have thousands. Those of arrow files come in their batches.
_ROWS = 16
_BUFFER = 1 << 20  # bytes
_POINTER = b"version https://git-lfs"
_ARROW_FILE = b"ARROW1"
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Rows in the place of which there is damage.

    Attributes:
        reason: Description of the damage.
        rows: Number of the rows; 0 where it is not known.
        is_row: Whether it is a value of one row, and not a part of the file.
    """

    reason: str
    rows: int
    is_row: bool = False


def read_columns(path: Path) -> tuple[Column, ...]:
    """Columns of a file, of whose contents nothing else is read.

    Raises:
        ValueError: It cannot be read, or two columns have the same name.
    """
    with _opened(path) as file, _readable(path):
        schema = file.schema_arrow if _is_parquet(path) else file.schema
        classes = _classes(schema.metadata or {})
        columns = tuple(
            Column(
                field.name,
                _form(field.type),
                shortened(str(field.type)),
                classes.get(field.name, ()) if _form(field.type) == NUMBER else (),
            )
            for field in schema
        )
    names = [column.name for column in columns]
    double = [name for name in names if names.count(name) > 1]
    if double:
        raise ValueError(f"{path} has several columns {double[0]}: expected each name once")
    return columns


def read_rows(path: Path, names: Sequence[str]) -> Iterator[Row | Unreadable]:
    """The rows of a file in order, as values by name of the column.

    Args:
        path: Path to the file.
        names: Columns to read.

    Raises:
        ValueError: It cannot be opened.
    """
    with _opened(path) as file:
        batches = _of_parquet(file, path, names) if _is_parquet(path) else _of_arrow(file, names)
        for batch in batches:
            if isinstance(batch, Unreadable):
                yield batch
                continue
            columns = [(name, batch.column(name)) for name in names]
            for number in range(batch.num_rows):
                yield _row(columns, number)


def _row(columns: Sequence[tuple[str, Any]], number: int) -> Row | Unreadable:
    row = {}
    for name, column in columns:
        try:
            row[name] = column[number].as_py()
        # A text that is not UTF-8, or a number that Python has not.
        except ValueError as error:
            reason = f"its {name} cannot be read: {reason_of(error)}"
            return Unreadable(reason, rows=1, is_row=True)
    return row


def _of_parquet(file: Any, path: Path, names: Sequence[str]) -> Iterator[Any]:
    with _readable(path):
        # Damage there can end the process where more of it is asked for, such as a column's codec.
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
    for group, size in enumerate(sizes):
        read, reason = 0, "it has fewer rows than it should"
        batches = file.iter_batches(
            batch_size=_ROWS, row_groups=[group], columns=list(names), use_threads=False
        )
        while read < size:
            try:
                batch = next(batches, None)
                if batch is None:
                    break
            # Damaged pages make pyarrow raise nearly anything.
            except Exception as error:
                reason = reason_of(error)
                break
            read += batch.num_rows
            yield batch
        if read < size:
            yield Unreadable(f"row group {group} cannot be read: {reason}", rows=size - read)


def _of_arrow(file: Any, names: Sequence[str]) -> Iterator[Any]:
    number = 0
    while True:
        try:
            if hasattr(file, "get_batch"):
                if number == file.num_record_batches:
                    return
                batch = file.get_batch(number)
            else:
                batch = file.read_next_batch()
            batch = batch.select(names)
            # Nothing else has looked at its offsets.
            batch.validate(full=True)
        except StopIteration:
            return
        except Exception as error:
            reason = f"batch {number} cannot be read, and nothing after it: {reason_of(error)}"
            yield Unreadable(reason, rows=0)
            return
        yield batch
        number += 1


# -- opening ---------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            "parquet and arrow files are read by pyarrow, which is not installed: run `pip install "
            "pyarrow`, or install this package with its extra parquet"
        ) from error
    with _readable(path):
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
        if start == _POINTER:
            raise ValueError("it is a pointer of Git LFS, not the file: run `git lfs pull`")
        source = pyarrow.OSFile(str(path))
    with source:
        with _readable(path):
            if _is_parquet(path):
                opened = parquet.ParquetFile(source, buffer_size=_BUFFER)
            elif start.startswith(_ARROW_FILE):
                opened = ipc.open_file(source)
            else:
                opened = ipc.open_stream(source)
        yield opened


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _readable(path: Path) -> Any:
    kind = "parquet file that is not encrypted" if _is_parquet(path) else "arrow file"
    return border(lambda why: f"{path} cannot be read: {why}; expected a whole {kind}")


# -- types -----------------------------------------------------------------------------------------


def _form(kind: Any) -> Form:
    from pyarrow import BaseExtensionType, types

    if isinstance(kind, BaseExtensionType):
        return _form(kind.storage_type)
    if types.is_dictionary(kind):
        return _form(kind.value_type)
    if types.is_struct(kind):
        return {field.name: _form(field.type) for field in kind}
    for asks, form in (
        (("string", "large_string", "string_view"), TEXT),
        (("integer", "floating"), NUMBER),
        (("binary", "large_binary", "binary_view", "fixed_size_binary"), BINARY),
        (("null",), NOTHING),
    ):
        if any(getattr(types, f"is_{name}")(kind) for name in asks):
            return form
    lists = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    if any(getattr(types, f"is_{name}")(kind) for name in lists):
        return [_form(kind.value_type)]
    return str(kind)


def _classes(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Names of the classes of columns of labels, as `datasets` writes them beside the columns."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            name: tuple(map(str, feature["names"]))
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    # Files of others have none; then a label is a number.
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}
