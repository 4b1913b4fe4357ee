"""The files of an evaluation: answers as they are given, from which another start goes on.

OUT/evaluation.json    which model is asked, and how
OUT/answers.jsonl      a line for each sample, in the order of the dataset
OUT/results.json       scores by metric and task, when it is done
OUT/report.html        the same as a page, with wrong answers
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from megatron_mimo.border import reason_of

EVALUATION, ANSWERS = "evaluation.json", "answers.jsonl"
RESULTS, REPORT = "results.json", "report.html"

Line = dict[str, Any]


class AnswerBook:
    """Answers on disk. Use it in a `with`.

    A line is written as soon as there is an answer, so a start that was ended loses at most the one
    it was working on.

    Args:
        folder: Folder of the evaluation; missing ones are made.
        asks: Which model is asked, and how: what has to be the same for another start to go on.

    Raises:
        ValueError: The folder holds another evaluation, or cannot be used.
    """

    def __init__(self, folder: Path, asks: Mapping[str, Any]) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / ANSWERS).open("a+b")
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be used: {reason_of(error)}") from error
        try:
            self._lock()
            self._earlier = self._read()
            self._identify(asks)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def earlier(self, number: int, digest: str, name: str) -> Line | None:
        """The line of a sample from an earlier start; None if it has none yet.

        Args:
            number: Number of the sample in the dataset, from 0.
            digest: Its digest.
            name: Its name in messages.

        Raises:
            ValueError: Another sample was there.
        """
        if number >= len(self._earlier):
            return None
        line = self._earlier[number]
        if line.get("digest") != digest:
            raise ValueError(
                f"--out {self._folder}: line {number + 1} of {ANSWERS} answers another sample than "
                f"{name}: expected the dataset that it was begun with; name another folder"
            )
        return line

    def write(self, line: Line) -> None:
        """Add the line of the next sample."""
        self._file.write(_encoded(line))
        self._file.flush()

    def rewrite(self, lines: list[Line]) -> None:
        """Replace the lines where they differ from those on disk, as after a change of metrics.

        Lines of further samples, which a smaller limit has left out, stay.
        """
        text = b"".join(map(_encoded, [*lines, *self._earlier[len(lines) :]]))
        path = self._folder / ANSWERS
        if path.read_bytes() != text:
            new = path.with_suffix(".new")
            new.write_bytes(text)
            os.replace(new, path)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"--out {self._folder} is in use by another process: wait for it, or name another "
                f"folder"
            ) from error

    def _read(self) -> list[Line]:
        """Whole lines of earlier starts; one that was cut off is removed."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        lines = []
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if not isinstance(line, dict) or "digest" not in line:
                raise ValueError(
                    f"{self._folder / ANSWERS}, line {number} is not an answer of an evaluation: "
                    f"name another folder with --out"
                )
            lines.append(line)
        return lines

    def _identify(self, asks: Mapping[str, Any]) -> None:
        """Write which model is asked, or compare it with what an earlier start has written."""
        path = self._folder / EVALUATION
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            earlier = None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {reason_of(error)}") from error
        if self._earlier and earlier != asks:
            different = [name for name in asks if _get(earlier, name) != asks[name]]
            raise ValueError(
                f"--out {self._folder} holds answers of another evaluation, with another "
                f"{' and '.join(different) or 'form'}: name another folder, or remove it"
            )
        path.write_text(json.dumps(asks, indent=2) + "\n", encoding="utf-8")


def _get(found: Any, name: str) -> Any:
    return found.get(name) if isinstance(found, dict) else None


def _encoded(line: Line) -> bytes:
    return (json.dumps(line, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
