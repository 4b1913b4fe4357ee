"""Sections that only the demo's report has: results, images, answers."""

from collections.abc import Sequence

from megatron_mimo.tools import page
from megatron_mimo.tools.cards import Card, Picture, grid

Section = tuple[str, str]


def results_section(rows: Sequence[tuple[str, str]]) -> Section:
    """Section on the exact match of several kinds of questions.

    Args:
        rows: Label and value of each row.
    """
    return "Exact match on held-out images", page.table(("", ""), rows)


def examples_section(examples: Sequence[Card]) -> Section:
    """Section of held-out images and the answers of the model.

    Args:
        examples: Examples to show.
    """
    return "Held-out images and the model's answers", _cards(examples)


def omni_results_section(
    head: Sequence[str], rows: Sequence[Sequence[str]], remark: str
) -> Section:
    """Section on the exact match of questions about several media.

    Args:
        head: Heading of each column.
        rows: Rows of cells.
        remark: What the columns mean.
    """
    return "Exact match on held-out questions", f"{page.table(head, rows)}{page.note(remark)}"


def omni_examples_section(examples: Sequence[Card]) -> Section:
    """Section of held-out files to see and to hear, and the answers of the model.

    Args:
        examples: Examples to show.
    """
    return "Held-out pictures, calls and videos, and the model's answers", _cards(examples)


def picture(png: bytes) -> Picture:
    """A PNG file on a card."""
    return Picture(content=png, media_type="image/png")


def _cards(examples: Sequence[Card]) -> str:
    right = sum(example.is_right for example in examples)
    remark = f"{right} of {len(examples)} shown are right; a red edge marks a wrong answer."
    return f"{page.note(remark)}{grid(examples)}"
