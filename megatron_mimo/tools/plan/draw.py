"""A step's timeline, as text and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from megatron_mimo.schedule.actions import Kind, Module, role_of
from megatron_mimo.schedule.timeline import Event, Timeline
from megatron_mimo.tools import picture
from megatron_mimo.topology import Layout

COMPUTE_COLORS = {
    (Module.ENCODER, False): "#9ecae1",
    (Module.ENCODER, True): "#3182bd",
    (Module.LLM, False): "#fdd0a2",
    (Module.LLM, True): "#e6550d",
}
"""(module, backward) -> colour in pictures."""
_STYLES = {
    (Module.ENCODER, False): "black on cyan",
    (Module.ENCODER, True): "white on blue",
    (Module.LLM, False): "black on yellow",
    (Module.LLM, True): "black on dark_orange",
}
_NAMES = {
    (Module.ENCODER, False): "encoder forward",
    (Module.ENCODER, True): "encoder backward",
    (Module.LLM, False): "llm forward",
    (Module.LLM, True): "llm backward",
}


@dataclass(frozen=True, slots=True)
class Row:
    """Ranks that compute the same at the same times.

    Attributes:
        ranks: Global ranks, ascending.
        stages: What they hold, in words.
        events: Their forwards and backwards.
        in_flight: The most microbatches that each module had forward without their backward.
    """

    ranks: tuple[int, ...]
    stages: str
    events: tuple[Event, ...]
    in_flight: dict[Module, int]

    @property
    def label(self) -> str:
        """The row's name: "encoder stage 0, ranks 0-1"."""
        return f"{self.stages}, {_ranks(self.ranks)}"

    @property
    def busy(self) -> float:
        """Time spent computing."""
        return sum(event.end - event.start for event in self.events)


def gather_rows(layout: Layout, step: Timeline) -> list[Row]:
    """One row for all ranks that do the same, in the order of their first rank."""
    rows: dict[object, list[int]] = {}
    events = {rank: tuple(step.compute(rank)) for rank in range(layout.world_size)}
    for rank, mine in events.items():
        key = (role_of(layout, rank), tuple((e.action, e.start) for e in mine))
        rows.setdefault(key, []).append(rank)
    return [
        Row(
            ranks=tuple(ranks),
            stages=_stages(layout, ranks[0]),
            events=events[ranks[0]],
            in_flight=_in_flight(events[ranks[0]]),
        )
        for ranks in rows.values()
    ]


def draw_text(rows: Sequence[Row], makespan: float) -> None:
    """Draw rows to the terminal, or without colours to a file: capitals forward, small backward."""
    console = Console(highlight=False, soft_wrap=True)
    label = max(len(row.label) for row in rows)
    shortest = min(event.end - event.start for row in rows for event in row.events)
    widest = max(len(_cell(event)) for row in rows for event in row.events)
    # Room for a name in the shortest cell, and a bar in front of it.
    scale = (widest + 1) / shortest
    for row in rows:
        line, at = Text(f"{row.label:<{label}}  "), 0
        for event in row.events:
            start, end = round(event.start * scale), round(event.end * scale)
            style = _STYLES[_kind(event)]
            line.append(" " * (start - at))
            line.append(f"|{_cell(event):<{end - start - 1}}", style=style)
            at = end
        line.append("|")
        console.print(line)
    console.print()
    key = Text("E encoder, L language model; capitals forward, small letters backward: ")
    for kind, style in _STYLES.items():
        key.append(f" {_NAMES[kind]} ", style=style)
        key.append(" ")
    console.print(key)
    console.print(f"the step takes {makespan:g}")
    for row in rows:
        flights = " and ".join(f"{number} of the {name}" for name, number in row.in_flight.items())
        console.print(
            f"{row.label:<{label}}  computes {row.busy / makespan:6.1%}, idle "
            f"{1 - row.busy / makespan:6.1%}, at most {flights} in flight"
        )


def draw_png(rows: Sequence[Row], makespan: float, path: str) -> None:
    """Draw rows into a picture.

    Raises:
        ValueError: matplotlib is missing, or the file cannot be written.
    """
    figure = picture.blank(figsize=(max(7, makespan * 0.32), 0.9 + 0.5 * len(rows)))
    axes = figure.subplots()
    seen = set()
    for y, row in enumerate(rows):
        for event in row.events:
            kind, width = _kind(event), event.end - event.start
            seen.add(kind)
            axes.barh(
                y,
                width,
                left=event.start,
                height=0.8,
                color=COMPUTE_COLORS[kind],
                edgecolor="white",
            )
            axes.text(
                event.start + width / 2,
                y,
                str(event.action.microbatch),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if kind == (Module.ENCODER, True) else "black",
            )
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, makespan)
    axes.set_xlabel("time")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    for kind in COMPUTE_COLORS:
        if kind in seen:
            # A bar of no length, for the legend.
            axes.barh(0, 0, color=COMPUTE_COLORS[kind], label=_NAMES[kind])
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(seen), frameon=False)
    picture.save(figure, path, bbox_inches="tight")


def _kind(event: Event) -> tuple[Module, bool]:
    return event.action.module, event.action.kind is Kind.BACKWARD


def _cell(event: Event) -> str:
    letter = event.action.module[0]
    forward = event.action.kind is Kind.FORWARD
    return f"{letter.upper() if forward else letter.lower()}{event.action.microbatch}"


def _stages(layout: Layout, rank: int) -> str:
    role = role_of(layout, rank)
    held = ((module, role.stage(module)) for module in Module)
    return " + ".join(f"{module} stage {stage}" for module, stage in held if stage is not None)


def _in_flight(events: Sequence[Event]) -> dict[Module, int]:
    trained = {event.action.module for event in events if event.action.kind is Kind.BACKWARD}
    most: dict[Module, int] = {}
    alive: dict[Module, int] = {}
    for event in events:
        module = event.action.module
        # Without a backward, a forward leaves nothing behind.
        step = 1 if event.action.kind is Kind.FORWARD else -1
        alive[module] = alive.get(module, 0) + step if module in trained else 1
        most[module] = max(most.get(module, 0), alive[module])
    return most


def _ranks(ranks: Sequence[int]) -> str:
    """Ascending ranks as runs: [0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
