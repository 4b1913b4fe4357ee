"""The page of `megatron-mimo data inspect`: one HTML file without external resources."""

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import Inputs
from megatron_mimo.data.samples.sample import EncodedSample, RawSample
from megatron_mimo.data.text.tokenizer import Tokenizer
from megatron_mimo.tools import page
from megatron_mimo.tools.data.figures import figures
from megatron_mimo.tools.data.statistics import (
    PERCENTILES,
    Distribution,
    Observation,
    Source,
    Statistics,
    kind_of_item,
)

_MOST_SHARDS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A sequence to show.

    Attributes:
        documents: Samples that share the sequence, with the content of their items.
        stored: The same samples with the files of their items.
        places: Origin of each sample.
    """

    documents: tuple[EncodedSample, ...]
    stored: tuple[RawSample, ...]
    places: tuple[Observation, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Adjacent tokens that are shown in the same style.

    Attributes:
        kind: Kind of the tokens: text, a special token, or the rows of one item.
        text: Text to show.
        is_target: Whether the model learns to write it.
        number: Number of tokens.
    """

    kind: Literal["text", "special", "image"]
    text: str
    is_target: bool
    number: int


_STYLE = """
  .charts { display: grid; gap: 1.5rem;
            grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); }
  .bar { display: grid; grid-template-columns: 8.5rem 1fr 4.5rem; gap: .5rem; font-size: .8rem;
         font-variant-numeric: tabular-nums; align-items: center; }
  .bar span { text-align: right; } .bar div { height: .8rem; background: #3b6fb6; }
  section { padding: .8rem; border: 1px solid #d9dce0; border-radius: .3rem; background: #fff;
            margin-bottom: 1rem; }
  .strip { display: flex; height: .9rem; background: #e6e8eb; margin: .4rem 0 .8rem; gap: 1px; }
  .strip div { background: #b9c9e2; overflow: hidden; display: flex; min-width: 1px; }
  .strip div:nth-child(even) { background: #93aed6; }
  article { border-left: .3rem solid #93aed6; padding-left: .8rem; margin: .8rem 0; }
  .images { display: flex; flex-wrap: wrap; gap: .75rem; margin: .4rem 0; }
  figure img { min-height: 4rem; max-height: 16rem; max-width: 100%; object-fit: contain;
               image-rendering: pixelated; border: 1px solid #d9dce0; }
  .frames { display: flex; gap: .2rem; overflow-x: auto; }
  .frames img { max-height: 8rem; }
  figure svg { display: block; width: 24rem; max-width: 100%; height: 4rem; background: #eef0f2; }
  .tokens { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap;
            overflow-wrap: anywhere; }
  .tokens span { background: #eef0f2; border-radius: .15rem; }
  .tokens .target { background: #bfe5cb; }
  .tokens .special { outline: 1px solid #9aa1a8; padding: 0 .2rem; margin: 0 .1rem; }
  .tokens .image { background: #f6dfb5; padding: 0 .3rem; margin: 0 .1rem; }
"""
_KEY = (
    '<p class="tokens"><span class="target">learnt</span> <span>read only</span> '
    '<span class="image">rows of an item</span> <span class="special">special token</span></p>'
)


def write_page(
    path: Path,
    statistics: Statistics,
    shown: Sequence[Shown],
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    lead: str,
    title: str,
) -> None:
    """Write the page.

    Args:
        path: Path to the HTML file to write.
        statistics: Counts over all samples.
        shown: Sequences to show.
        config: Settings with which the sequences were encoded.
        tokenizer: Tokenizer with which the sequences were encoded.
        lead: Sentence on what was read.
        title: Heading of the page.
    """
    charts = "".join(
        _chart(title, distribution)
        for title, distribution in (
            ("positions of a sample (tokens and rows)", statistics.positions),
            ("targets of a sample (tokens to learn)", statistics.targets),
            ("rows of a sample with images", statistics.rows_of_samples),
            ("rows of an image", statistics.rows_of_images),
            *(
                (f"rows of {config.inputs[kind].words.one}", distribution)
                for kind, distribution in statistics.rows_of_others.items()
            ),
            ("images of a sample", statistics.images),
            ("positions taken of a sequence", statistics.filled),
        )
        if distribution.counts
    )
    sequences = "".join(_sequence(sequence, config, tokenizer) for sequence in shown)
    page.write_page(
        path,
        title=title,
        lead=lead,
        sections=(
            ("Datasets", _sources(statistics)),
            ("Lengths", f'<div class="charts">{charts}</div>'),
            ("Left out of training", _bad(statistics)),
            ("Sequences", f"{_KEY}{sequences or '<p>None.</p>'}"),
        ),
        style=_STYLE,
    )


# -- numbers ---------------------------------------------------------------------------------------


def _sources(statistics: Statistics) -> str:
    rows = [(name, source) for name, source in statistics.sources.items()]
    shards = [(f"{name}, {shard}", source) for (name, shard), source in statistics.shards.items()]
    head = ("", "samples", "bad", "text only", "images", "positions", "targets")

    def table(listed: list[tuple[str, Source]]) -> str:
        lines = [
            (
                name,
                f"{source.samples:,}",
                f"{source.bad:,}",
                f"{source.text_only:,}",
                f"{source.images:,}",
                f"{source.tokens:,}",
                f"{source.targets:,}",
            )
            for name, source in listed
        ]
        return page.table(head, lines)

    more = f"<p>and {len(shards) - _MOST_SHARDS} more</p>" if len(shards) > _MOST_SHARDS else ""
    by_shard = f"{table(shards[:_MOST_SHARDS])}{more}"
    return table(rows) + page.folded(f"by shard: {len(shards)}", by_shard)


def _bad(statistics: Statistics) -> str:
    rows = [
        (kind, f"{found.count:,}", f"{found.example}: {found.detail}")
        for kind, found in sorted(statistics.bad.items(), key=lambda item: -item[1].count)
    ]
    if not rows:
        return f"<p>None of {statistics.samples:,} samples.</p>"
    return page.table(("what is wrong", "samples", "for instance"), rows)


def _chart(title: str, distribution: Distribution) -> str:
    bars = distribution.bars()
    most = max(count for _, _, count in bars)
    lines = "".join(
        f'<div class="bar"><span>{first:,}{f" to {last:,}" if last > first else ""}</span>'
        f'<div style="width: {100 * count / most:.1f}%"></div><span>{count:,}</span></div>'
        for first, last, count in bars
    )
    at = ", ".join(f"p{percent} {distribution.percentile(percent):,}" for percent in PERCENTILES)
    return (
        f"<div><h3>{html.escape(title)}</h3>{lines}"
        f'<p class="small">mean {distribution.mean:,.1f}, {at}, largest '
        f"{distribution.largest:,}</p></div>"
    )


# -- sequences -------------------------------------------------------------------------------------


def _sequence(shown: Shown, config: DataConfig, tokenizer: Tokenizer) -> str:
    sizes = [document.num_positions for document in shown.documents]
    start, bounds = 0, []
    for size in sizes:
        bounds.append((start, start + size))
        start += size
    targets = sum(document.target_tokens for document in shown.documents)
    title = (
        f"{start:,} of {config.seq_length:,} positions, {targets:,} targets, "
        f"{len(sizes)} document{'s' if len(sizes) > 1 else ''}"
    )
    strip = "".join(
        f'<div style="width: {100 * size / config.seq_length:.2f}%"></div>' for size in sizes
    )
    documents = "".join(
        _document(document, stored, place, bound, config, tokenizer)
        for document, stored, place, bound in zip(
            shown.documents, shown.stored, shown.places, bounds, strict=True
        )
    )
    return f'<section><h3>{title}</h3><div class="strip">{strip}</div>{documents}</section>'


def _document(
    document: EncodedSample,
    stored: RawSample,
    place: Observation,
    bound: tuple[int, int],
    config: DataConfig,
    tokenizer: Tokenizer,
) -> str:
    rows = sum(item.rows for items in document.items.values() for item in items)
    where = f"{place.source}, {place.shard}"
    about = (
        f"{where}: positions {bound[0]:,} to {bound[1] - 1:,}, {rows:,} rows, "
        f"{document.target_tokens:,} targets"
    )
    flaw = (
        "" if document.flaw is None else f'<p class="small">{html.escape(document.flaw.reason)}</p>'
    )
    images = figures(document, stored, config.inputs)
    tokens = "".join(map(_span, spans(document, config.inputs, tokenizer)))
    return (
        f"<article><h3>{html.escape(document.key)}</h3>"
        f'<p class="small">{html.escape(about)}</p>{flaw}'
        f'<div class="images">{images}</div><div class="tokens">{tokens}</div></article>'
    )


def _span(span: Span) -> str:
    kinds = [*([span.kind] if span.kind != "text" else []), *(["target"] if span.is_target else [])]
    mark = f' class="{" ".join(kinds)}"' if kinds else ""
    return f'<span{mark} title="{span.number} tokens">{html.escape(span.text)}</span>'


def spans(document: EncodedSample, inputs: Inputs, tokenizer: Tokenizer) -> list[Span]:
    """Tokens of a document in runs of one kind; the rows of each item are a run.

    Args:
        document: Sample that was encoded with the tokenizer.
        inputs: Kinds of items, with their names.
        tokenizer: Tokenizer that converts tokens to text; special tokens are shown by name or id.
    """
    found: list[Span] = []
    text: list[int] = []
    tokens, targets = document.tokens.tolist(), document.targets.tolist()
    modules = {token: module for module, token in tokenizer.placeholder_ids.items()}
    items = {module: iter(of_module) for module, of_module in document.items.items()}
    numbers: Counter[str] = Counter()

    def flush(is_target: bool) -> None:
        if text:
            decoded = tokenizer.decode(text)
            found.append(Span(kind="text", text=decoded, is_target=is_target, number=len(text)))
            text.clear()

    at = 0
    while at < len(tokens):
        token, is_target = tokens[at], targets[at]
        if at and targets[at - 1] != is_target:
            flush(targets[at - 1])
        if token in modules:
            flush(is_target)
            module = modules[token]
            item = next(items[module])
            kind = kind_of_item(item, module, inputs)
            numbers[kind] += 1
            shown = f"{inputs[kind].words.noun} {numbers[kind]}: {item.rows} rows"
            first, left = at, item.rows
            while left:
                # Marks and texts between the lines of an item count with it.
                left -= tokens[at] == token
                at += 1
            found.append(Span(kind="image", text=shown, is_target=False, number=at - first))
            continue
        if tokenizer.decode([token]):
            text.append(token)
        else:
            flush(is_target)
            name = "end of sequence" if token == tokenizer.eos_id else f"token {token}"
            found.append(Span(kind="special", text=name, is_target=is_target, number=1))
        at += 1
    flush(bool(targets[-1:] and targets[-1]))
    return found
