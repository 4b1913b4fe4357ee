"""The page of `megatron-mimo evaluate`: results, and cards of wrong answers."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_mimo.data.inputs import Inputs
from megatron_mimo.data.text.placeholders import split_text
from megatron_mimo.tools import page
from megatron_mimo.tools.cards import STYLE, Card, Picture, grid
from megatron_mimo.tools.evaluate.answers import Line
from megatron_mimo.tools.evaluate.dataset import Asked
from megatron_mimo.tools.evaluate.metrics import METRICS
from megatron_mimo.tools.evaluate.results import HEAD, Result, rows_of

_BROWSERS_SHOW = ("image/png", "image/jpeg", "image/gif", "image/webp")
_LARGE = 200_000  # bytes
_SIDE = 512  # pixels
_WIDTH = 84  # rem


@dataclass(frozen=True, kw_only=True, slots=True)
class Wrong:
    """A sample that was answered wrongly.

    Attributes:
        asked: The sample.
        line: Line of its answer.
    """

    asked: Asked
    line: Line


def write_report(
    path: Path,
    results: Sequence[Result],
    wrong: Sequence[Wrong],
    *,
    num_wrong: int,
    bad: Sequence[str],
    num_bad: int,
    inputs: Inputs,
    title: str,
    lead: str,
) -> None:
    """Write the page.

    Args:
        path: Path to the HTML file.
        results: Results by metric and task.
        wrong: Wrong answers to show.
        num_wrong: Number of all wrong answers.
        bad: Messages of the first samples that could not be evaluated.
        num_bad: Number of all such samples.
        inputs: Kinds of items, with their placeholders.
        title: Heading.
        lead: Sentence below it.
    """
    remark = f"{len(wrong)} of {num_wrong:,} wrong answers, spread over the dataset."
    sections = [
        ("Results", page.table(HEAD, rows_of(results))),
        ("Wrong answers", page.note(remark) + grid([_card(each, inputs) for each in wrong])),
    ]
    if num_bad:
        lines = "".join(page.note(message) for message in bad)
        more = page.note(f"and {num_bad - len(bad):,} more") if num_bad > len(bad) else ""
        sections.append((f"Not evaluated: {num_bad:,} samples", lines + more))
    page.write_page(path, title=title, lead=lead, sections=sections, style=STYLE, width=_WIDTH)


def _card(wrong: Wrong, inputs: Inputs) -> Card:
    asked, line = wrong.asked, wrong.line
    scores = ", ".join(
        f"{metric.title} {line['scores'][name]:.2f}"
        for name, metric in METRICS.items()
        if name in line["scores"]
    )
    task = "" if asked.task is None else f"{asked.task}; "
    text = "".join(piece for piece, _ in split_text(asked.turns[-1].text, inputs))
    choices = f" [{' | '.join(asked.expected.choices)}]" if asked.expected.choices else ""
    return Card(
        pictures=tuple(
            picture
            for module, sources in asked.items.items()
            if inputs[module].words.noun == "image"
            for source in sources
            if (picture := shown(source)) is not None
        ),
        question=text.strip() + choices,
        expected=" / ".join(dict.fromkeys(asked.expected.references)),
        answer=line["answer"],
        is_right=False,
        remark=f"{task}{scores}; {asked.key}",
    )


def shown(source: Any) -> Picture | None:
    """An image as a page shows it: its own file, or a smaller one where that is large.

    Args:
        source: Contents of an image file, or pixels, uint8 [H, W, 3].

    Returns:
        The picture; None for what Pillow cannot show.
    """
    try:
        if not isinstance(source, bytes):
            return _encoded(Image.fromarray(np.asarray(source)))
        with Image.open(io.BytesIO(source)) as image:
            kind = image.get_format_mimetype()
            if kind in _BROWSERS_SHOW and len(source) <= _LARGE:
                return Picture(content=source, media_type=kind)
            return _encoded(image)
    # Pillow raises nearly anything; the answer is shown without the image then.
    except Exception:
        return None


def _encoded(image: Image.Image) -> Picture:
    image.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=85)
    return Picture(content=content.getvalue(), media_type="image/jpeg")
