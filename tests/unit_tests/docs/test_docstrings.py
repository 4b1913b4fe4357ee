"""Docstrings say what a field or an argument is, and what shape a tensor has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[3]

# Folders that the rules hold for: the whole package, and what is run beside it.
HELD = ("benchmarks", "docs", "examples", "megatron_mimo")

# First words of an entry that leave out what it is: "Of the run.", "In order.", "That it reads."
FRAGMENT = re.compile(
    r"(As|At|Behind|By|Decides|For|From|In|It|Of|On|Stands|That|To|Told|Whose|With)\b"
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Described(NamedTuple):
    """A definition with its dotted name and its docstring, "" where it has none."""

    name: str
    node: ast.ClassDef | Function
    text: str


def definitions(body: list[ast.stmt], parents: tuple[str, ...] = ()) -> Iterator[Described]:
    """Classes, functions and methods; those inside a function are its own matter."""
    for node in body:
        if isinstance(node, ast.ClassDef | Function):
            names = (*parents, node.name)
            yield Described(".".join(names), node, ast.get_docstring(node) or "")
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, names)


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Name and first line of each entry under Args: and Attributes:."""
    for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", text, re.M):
        yield from re.findall(r"^    (\*{0,2}\w+): (.*)$", section, re.M)


def takes_or_gives_tensors(function: Function) -> bool:
    """Whether an annotation of an argument or of the result contains `Tensor`."""
    arguments = function.args
    annotations = [
        argument.annotation
        for argument in [
            *arguments.posonlyargs,
            *arguments.args,
            *arguments.kwonlyargs,
            arguments.vararg,
            arguments.kwarg,
        ]
        if argument is not None
    ]
    return any(
        re.search(r"\bTensor\b", ast.unparse(annotation))
        for annotation in [*annotations, function.returns]
        if annotation is not None
    )


def unclear_entries(source: str) -> list[str]:
    """Entries whose first word shows that they leave out what they are."""
    return [
        f"{described.name}: {name}: {line}"
        for described in definitions(ast.parse(source).body)
        for name, line in entries(described.text)
        if FRAGMENT.match(line)
    ]


def unshaped(source: str) -> list[str]:
    """Public functions of tensors whose docstring has no shape, such as [T, H], and no `scalar`."""
    return [
        described.name
        for described in definitions(ast.parse(source).body)
        if isinstance(described.node, Function)
        and not any(part.startswith("_") for part in described.name.split("."))
        and takes_or_gives_tensors(described.node)
        and not re.search(r"\[[^\]]+\]|\bscalars?\b", described.text)
    ]


def held_files() -> list[Path]:
    """Files that the rules hold for."""
    return sorted(path for folder in HELD for path in (ROOT / folder).rglob("*.py"))


FILES = pytest.mark.parametrize("path", held_files(), ids=lambda path: str(path.relative_to(ROOT)))


@FILES
def test_entries_begin_with_what_they_are(path: Path) -> None:
    assert unclear_entries(path.read_text(encoding="utf-8")) == []


@FILES
def test_functions_of_tensors_name_a_shape(path: Path) -> None:
    assert unshaped(path.read_text(encoding="utf-8")) == []


def test_every_folder_has_files() -> None:
    assert all(any((ROOT / folder).rglob("*.py")) for folder in HELD)


def test_what_is_unclear_is_found() -> None:
    source = '''
class Reader:
    """Reads.

    Attributes:
        path: Path to the file.
        lanes: Of the run,
            all of them.
        turns: In order.
        offset: Index of the first element.
    """

    def values(self, scale: "Tensor | None") -> None:
        """Values.

        Args:
            scale: Of the values.
        """

    def rows(self) -> dict[str, torch.Tensor]:
        """Rows [T, H] by name."""

    def _rows(self) -> Tensor:
        """Private."""

def norm(x: ShardedTensor) -> Tensor:
    """Norm, a scalar."""
'''
    assert unclear_entries(source) == [
        "Reader: lanes: Of the run,",
        "Reader: turns: In order.",
        "Reader.values: scale: Of the values.",
    ]
    assert unshaped(source) == ["Reader.values"]
