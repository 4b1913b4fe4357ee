"""A file of questions in JSON Lines."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mimo.border import reason_of

_NOUNS = ("image", "video", "audio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question of a file.

    Attributes:
        where: File and line, for messages.
        text: Text of the question.
        files: Noun of a kind of items, such as "image" -> paths of its files.
        fields: The line as it is stored; its fields stand in the answer too.
    """

    where: str
    text: str
    files: Mapping[str, tuple[Path, ...]]
    fields: Mapping[str, Any]


def read_questions(path: Path) -> list[Question]:
    """Read every question before the first is asked.

    Args:
        path: Path to the file; others are named from its folder. Empty lines are passed over.

    Raises:
        ValueError: The file cannot be read, has no question, or a line is not one; the message
            names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--questions {path} cannot be read: {reason_of(error)}") from error
    questions = [
        _question(line, f"--questions {path}, line {number}", path.parent)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not questions:
        raise ValueError(f'--questions {path} is empty: expected lines such as {{"question": "?"}}')
    return questions


def _question(line: str, where: str, folder: Path) -> Question:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("question"), str):
        found = (
            f"an object with {', '.join(fields) or 'no fields'}"
            if isinstance(fields, dict)
            else type(fields).__name__
        )
        raise ValueError(f'{where} is {found}: expected an object with the text "question"')
    files = {noun: _files(fields, noun, where, folder) for noun in _NOUNS}
    return Question(where=where, text=fields["question"], files=files, fields=fields)


def _files(fields: Mapping[str, Any], noun: str, where: str, folder: Path) -> tuple[Path, ...]:
    """Paths that a line names as one file or as several."""
    given = [name for name in (noun, f"{noun}s") if fields.get(name) not in (None, [], "")]
    if len(given) > 1:
        raise ValueError(f"{where} has {given[0]} and {given[1]}: expected one of them")
    named = fields[given[0]] if given else []
    named = named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) for name in named):
        raise ValueError(
            f"{where}: {given[0]} is {named!r}: expected the path of a file, or a list"
        )
    return tuple(folder / name for name in named)
