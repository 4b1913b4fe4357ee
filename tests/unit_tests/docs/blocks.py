"""Fenced blocks of the pages, and the commands that stand in them.

A block is marked with its language. In one of `bash`, `NAME="..."` sets a variable that later lines
and later blocks of the page use as `$NAME`, as in a terminal. A YAML block whose first line is a
comment with a path is that file.
"""

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGES = (
    ROOT / "README.md",
    ROOT / "examples/mimo/README.md",
    ROOT / "scripts/README.md",
    *sorted(ROOT.glob("docs/how-to/*.md")),
    ROOT / "docs/develop/add-a-module.md",
)

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
_OF_THE_SHELL = {">", "|", "&&"}
_VARIABLE = re.compile(r'([A-Z]\w*)="([^"]*)"')


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: Number of its first line in the page.
        language: What stands behind the fence; empty for what a program prints.
        text: Contents.
    """

    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The path of the file that it is; None if it is none."""
        found = re.match(r"# (\S+\.yaml)\n", self.text)
        return found[1] if self.language == "yaml" and found else None


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of a page.

    Attributes:
        line: Number of the line in the page on which its block begins.
        words: Its words, without variables in front; the first is the program.
    """

    line: int
    words: tuple[str, ...]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 2
        yield Block(line=line, language=found[2], text=found[3])


def commands(page: Path) -> Iterator[Command]:
    """The commands in a page's blocks of bash, in order."""
    variables: dict[str, str] = {}
    for block in blocks(page):
        if block.language != "bash":
            continue
        for line in _logical_lines(block.text):
            if (variable := _VARIABLE.fullmatch(line)) is not None:
                variables[variable[1]] = variable[2]
                continue
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z]\w*=", words[0]):
                words.pop(0)
            # What follows is the shell's: another command, or where the output goes.
            words = list(itertools.takewhile(lambda word: word not in _OF_THE_SHELL, words))
            if words:
                yield Command(line=block.line, words=tuple(words))


def _logical_lines(text: str) -> Iterator[str]:
    """Lines of bash: those that a backslash or an open quotation mark continues are one."""
    line = ""
    for part in text.replace("\\\n", " ").splitlines():
        line = f"{line} {part}" if line else part
        if line.partition(" #")[0].count('"') % 2 == 0:
            yield line
            line = ""
