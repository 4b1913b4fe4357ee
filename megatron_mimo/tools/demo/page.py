"""Sections that only the demo's report has: results, images, answers."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mimo.tools import page

Section = tuple[str, str]
STYLE = """
  .grid { display: grid; gap: .75rem;
          grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); }
  .grid figure { padding: .6rem; border: 1px solid #d9dce0; border-left: .3rem solid #2a7d4f;
                 border-radius: .3rem; background: #fff; }
  .grid figure.wrong { border-left-color: #c0392b; }
  .grid img { height: 3.5rem; max-width: 100%; object-fit: contain; image-rendering: pixelated; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One held-out image with the answer of the model.

    Attributes:
        image: Contents of the image file.
        media_type: Media type of the file, such as "image/png".
        question: Question that was asked.
        expected: Correct answer.
        answer: Answer of the model.
    """

    image: bytes
    media_type: str
    question: str
    expected: str
    answer: str

    @property
    def is_right(self) -> bool:
        """Whether the whole answer is correct."""
        return self.answer == self.expected


def results_section(rows: Sequence[tuple[str, str]]) -> Section:
    """Section on the exact match of several kinds of questions.

    Args:
        rows: Label and value of each row.
    """
    return "Exact match on held-out images", page.table(("", ""), rows)


def examples_section(examples: Sequence[Example]) -> Section:
    """Section of held-out images and the answers of the model.

    Args:
        examples: Examples to show.
    """
    right = sum(example.is_right for example in examples)
    remark = f"{right} of {len(examples)} shown are right; a red edge marks a wrong answer."
    figures = "".join(map(_figure, examples))
    return (
        "Held-out images and the model's answers",
        f'{page.note(remark)}<div class="grid">{figures}</div>',
    )


def _figure(example: Example) -> str:
    data = base64.b64encode(example.image).decode("ascii")
    said = page.escape(example.answer) or "(nothing)"
    verdict = (
        f"<b>{said}</b>"
        if example.is_right
        else f"<b>{said}</b>, should be <b>{page.escape(example.expected)}</b>"
    )
    return (
        f'<figure class="{"right" if example.is_right else "wrong"}">'
        f'<img src="data:{example.media_type};base64,{data}" alt="held-out image">'
        f"<figcaption>{page.escape(example.question)}<br>{verdict}</figcaption></figure>"
    )
