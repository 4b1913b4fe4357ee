"""Sections that only the demo's report has: results, images, answers."""

from collections.abc import Sequence

from megatron_mimo.tools import page
from megatron_mimo.tools.cards import Card, grid

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
    right = sum(example.is_right for example in examples)
    remark = f"{right} of {len(examples)} shown are right; a red edge marks a wrong answer."
    return "Held-out images and the model's answers", f"{page.note(remark)}{grid(examples)}"
