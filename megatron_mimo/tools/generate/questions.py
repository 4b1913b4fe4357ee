"""A file of questions in JSON Lines."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mimo.border import reason_of

_IMAGE_FIELDS = ("image", "images")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question of a file.

    Attributes:
        where: File and line, for messages.
        text: Text of the question.
        images: Paths of its images.
        fields: The line as it is stored; its fields stand in the answer too.
    """

    where: str
    text: str
    images: tuple[Path, ...]
    fields: Mapping[str, Any]


def read_questions(path: Path) -> list[Question]:
    """Read every question before the first is asked.

    Args:
        path: Path to the file; images are named from its folder. Empty lines are passed over.

    Raises:
        ValueError: The file cannot be read, has no question, or a line is not one; the message
            names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
    given = [name for name in _IMAGE_FIELDS if fields.get(name) not in (None, [], "")]
    if len(given) > 1:
        raise ValueError(f"{where} has image and images: expected one of them")
    named = fields[given[0]] if given else []
    named = named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) for name in named):
        raise ValueError(
            f"{where}: {given[0]} is {named!r}: expected the path of a file, or a list"
        )
    return Question(
        where=where,
        text=fields["question"],
        images=tuple(folder / name for name in named),
        fields=fields,
    )
