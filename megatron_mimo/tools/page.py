"""Frame of our HTML pages: one file without external resources."""

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

_FRAME = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: ${width}rem; margin: 2rem auto;
         padding: 0 1rem; color: #1c2024; background: #fcfcfd; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
  h3 { font-size: .95rem; margin: 0 0 .4rem; font-weight: 600; overflow-wrap: anywhere; }
  table { border-collapse: collapse; font-size: .9rem; }
  td, th { padding: .25rem 1rem .25rem 0; text-align: left; border-bottom: 1px solid #e0e3e6;
           overflow-wrap: anywhere; vertical-align: top; }
  td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
  .facts th { font-weight: 400; color: #5a6168; }
  figure { margin: 0; } figcaption, .small { font-size: .85rem; color: #5a6168; }
  .small { margin: .2rem 0; }
  summary { cursor: pointer; margin: .5rem 0; }
  pre { font: 13px/1.5 ui-monospace, monospace; overflow-x: auto; background: #f1f3f5;
        padding: .8rem; border-radius: .3rem; }
$style
</style>
$head
</head>
<body>
<h1>$title</h1>
<p>$lead</p>
$body
</body>
</html>
""")
_NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?( ?(%|[kMGT]?i?B|ms|s))?")


def write_page(
    path: Path,
    *,
    title: str,
    lead: str,
    sections: Iterable[tuple[str, str]],
    style: str = "",
    head: str = "",
    width: int = 60,
) -> None:
    """Write a page.

    Args:
        path: Path to the HTML file to write.
        title: Heading, as plain text.
        lead: Sentence below the heading, as plain text.
        sections: Heading as plain text, and HTML, of each section.
        style: Additional CSS.
        head: Additional HTML in the head.
        width: Largest width of the text in rem.
    """
    page = _FRAME.substitute(
        title=escape(title),
        lead=escape(lead),
        body="\n".join(f"<h2>{escape(name)}</h2>\n{body}" for name, body in sections),
        style=style,
        head=head,
        width=width,
    )
    path.write_text(page, encoding="utf-8")


def escape(text: str) -> str:
    """Plain text as HTML."""
    return html.escape(text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """HTML table; cells are plain text, and those that are numbers are aligned to the right.

    Args:
        head: Heading of each column.
        rows: Rows of cells.
    """
    headings = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{headings}</tr></thead><tbody>{lines}</tbody></table>"


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """HTML table of names and values, both plain text."""
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows
    )
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def folded(summary: str, body: str) -> str:
    """HTML that is shown when the user clicks its summary, which is plain text."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def note(text: str) -> str:
    """HTML of a remark in small print."""
    return f'<p class="small">{escape(text)}</p>'


def _cell(text: str) -> str:
    kind = " class=number" if _NUMBER.fullmatch(text) else ""
    return f"<td{kind}>{escape(text)}</td>"
