"""The demo's report: one HTML page that needs nothing beside it."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One held-out image with what the model said.

    Attributes:
        image: The image file's bytes.
        media_type: For instance "image/png".
        question: As asked.
        expected: The right answer.
        answer: The model's.
    """

    image: bytes
    media_type: str
    question: str
    expected: str
    answer: str

    @property
    def is_right(self) -> bool:
        """Whether the whole answer is right."""
        return self.answer == self.expected


@dataclass(frozen=True, kw_only=True, slots=True)
class LossPoint:
    """One point of a loss curve."""

    iteration: int
    loss: float


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
         color: #1c2024; background: #fcfcfd; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
  table { border-collapse: collapse; }
  td, th { padding: .3rem 1rem .3rem 0; text-align: left; border-bottom: 1px solid #e0e3e6; }
  td.number { text-align: right; font-variant-numeric: tabular-nums; }
  svg { max-width: 100%; height: auto; }
  .grid { display: grid; gap: .75rem;
          grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); }
  figure { margin: 0; padding: .6rem; border: 1px solid #d9dce0; border-left: .3rem solid #2a7d4f;
           border-radius: .3rem; background: #fff; }
  figure.wrong { border-left-color: #c0392b; }
  figure img { height: 3.5rem; max-width: 100%; object-fit: contain; image-rendering: pixelated; }
  figcaption { font-size: .85rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$lead</p>
<h2>Exact match on held-out images</h2>
<table><tbody>$rows</tbody></table>
<h2>Loss</h2>
$curve
<h2>Held-out images and the model's answers</h2>
<p>$right of $shown shown are right; a red edge marks a wrong answer.</p>
<div class="grid">$figures</div>
</body>
</html>
""")


def write_report(
    path: Path,
    *,
    title: str,
    lead: str,
    rows: Sequence[tuple[str, str]],
    training: Sequence[LossPoint],
    validation: Sequence[LossPoint],
    examples: Sequence[Example],
) -> None:
    """Write the page.

    Args:
        path: Where to.
        title: Heading.
        lead: A sentence on what was run.
        rows: The results table, label and value.
        training: Loss of the logged iterations.
        validation: Loss of the evaluations; may be empty.
        examples: Images to show.
    """
    page = _PAGE.substitute(
        title=html.escape(title),
        lead=html.escape(lead),
        rows="".join(
            f'<tr><th>{html.escape(label)}</th><td class="number">{html.escape(value)}</td></tr>'
            for label, value in rows
        ),
        curve=_curve(training, validation),
        right=sum(example.is_right for example in examples),
        shown=len(examples),
        figures="".join(_figure(example) for example in examples),
    )
    path.write_text(page, encoding="utf-8")


def _figure(example: Example) -> str:
    data = base64.b64encode(example.image).decode("ascii")
    said = html.escape(example.answer) or "(nothing)"
    verdict = (
        f"<b>{said}</b>"
        if example.is_right
        else f"<b>{said}</b>, should be <b>{html.escape(example.expected)}</b>"
    )
    return (
        f'<figure class="{"right" if example.is_right else "wrong"}">'
        f'<img src="data:{example.media_type};base64,{data}" alt="held-out image">'
        f"<figcaption>{html.escape(example.question)}<br>{verdict}</figcaption></figure>"
    )


def _curve(training: Sequence[LossPoint], validation: Sequence[LossPoint]) -> str:
    """The loss curves as an SVG element."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots()
    for points, label, color, marker in (
        (training, "training", "#3b6fb6", ""),
        (validation, "held out", "#d9822b", "o"),
    ):
        if points:
            iterations, losses = [p.iteration for p in points], [p.loss for p in points]
            axes.plot(iterations, losses, label=label, color=color, marker=marker)
    axes.set_xlabel("iteration")
    axes.set_ylabel("lm loss")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
