"""A step's timeline, as text and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from megatron_mimo.schedule.actions import Kind
from megatron_mimo.schedule.timeline import Event, Timeline
from megatron_mimo.tools import picture
from megatron_mimo.tools.words import in_words
from megatron_mimo.topology import Layout

# (forward, backward) of the target, and of the sources in their order; colours repeat.
_TARGET_COLORS = ("#fdd0a2", "#e6550d")
_SOURCE_COLORS = (
    ("#9ecae1", "#3182bd"),
    ("#c7e9c0", "#31a354"),
    ("#dadaeb", "#756bb1"),
    ("#d9d9d9", "#636363"),
)
_TARGET_STYLES = ("black on yellow", "black on dark_orange")
_SOURCE_STYLES = (
    ("black on cyan", "white on blue"),
    ("black on green3", "white on dark_green"),
    ("black on plum3", "white on purple4"),
    ("black on grey70", "white on grey37"),
)


# Inches of a picture, of which a browser still shows 110 pixels each.
_LEAST_INCHES, _MOST_INCHES = 7, 60
_INCHES_OF_PASS, _INCHES_OF_ROW, _INCHES_AROUND = 0.32, 0.5, 0.9
_INCHES_OF_NUMBER = 0.09
_MOST_COLUMNS = 4000


def compute_colors(modules: Sequence[str]) -> dict[tuple[str, bool], str]:
    """(module, backward) -> colour in pictures.

    Args:
        modules: Names, the target's last.
    """
    return _by_module(modules, _SOURCE_COLORS, _TARGET_COLORS)


def _by_module(
    modules: Sequence[str], of_sources: Sequence[tuple[str, str]], of_target: tuple[str, str]
) -> dict[tuple[str, bool], str]:
    *sources, target = modules
    pairs = {name: of_sources[i % len(of_sources)] for i, name in enumerate(sources)}
    pairs[target] = of_target
    return {
        (name, backward): pair[backward]
        for name, pair in pairs.items()
        for backward in (False, True)
    }


@dataclass(frozen=True, slots=True)
class Row:
    """Ranks that compute the same at the same times.

    Attributes:
        ranks: Global ranks, ascending.
        stages: Description of the stages that they hold.
        events: Forwards and backwards of these ranks.
        in_flight: Largest number of microbatches of each module between their forward and backward.
    """

    ranks: tuple[int, ...]
    stages: str
    events: tuple[Event, ...]
    in_flight: dict[str, int]

    @property
    def label(self) -> str:
        """The row's name: "encoder stage 0, ranks 0-1"."""
        return f"{self.stages}, {_ranks(self.ranks)}"

    @property
    def drawn(self) -> tuple[Event, ...]:
        """The forwards and backwards that take time."""
        return tuple(event for event in self.events if event.end > event.start)

    @property
    def busy(self) -> float:
        """Time spent computing."""
        return sum(event.end - event.start for event in self.events)


def gather_rows(layout: Layout, step: Timeline) -> list[Row]:
    """One row for all ranks that do the same, in the order of their first rank."""
    rows: dict[object, list[int]] = {}
    events = {rank: tuple(step.compute(rank)) for rank in range(layout.world_size)}
    for rank, mine in events.items():
        key = (layout.stages_of(rank), tuple((e.action, e.start) for e in mine))
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


def draw_text(rows: Sequence[Row], makespan: float, modules: Sequence[str]) -> None:
    """Draw rows to the terminal, or without colours to a file: capitals forward, small backward.

    Args:
        rows: Rows from `gather_rows`.
        makespan: Length of the step.
        modules: Names of the modules, the target's last.
    """
    letters = cell_letters(modules)
    styles = _by_module(modules, _SOURCE_STYLES, _TARGET_STYLES)
    console = Console(highlight=False, soft_wrap=True)
    label = max(len(row.label) for row in rows)
    widest = max(len(_cell(event, letters)) for row in rows for event in row.drawn)
    # Room for a name in the shortest cell, and a bar in front of it, while lines have an end.
    scale = min((widest + 1) / _shortest(rows), _MOST_COLUMNS / makespan)
    for row in rows:
        line, at = Text(f"{row.label:<{label}}  "), 0
        for event in row.drawn:
            start, end = round(event.start * scale), round(event.end * scale)
            style = styles[_kind(event)]
            line.append(" " * (start - at))
            width = end - start
            line.append(f"|{_cell(event, letters):<{width}}"[:width], style=style)
            at = end
        line.append("|")
        console.print(line)
    console.print()
    named = ", ".join(f"{letters[name]} {in_words(name)}" for name in modules)
    key = Text(f"{named}; capitals forward, small letters backward: ")
    for kind, style in styles.items():
        key.append(f" {_name(kind)} ", style=style)
        key.append(" ")
    console.print(key)
    console.print(f"the step takes {makespan:g}")
    for row in rows:
        flights = " and ".join(f"{number} of the {name}" for name, number in row.in_flight.items())
        console.print(
            f"{row.label:<{label}}  computes {row.busy / makespan:6.1%}, idle "
            f"{1 - row.busy / makespan:6.1%}, at most {flights} in flight"
        )


def draw_png(rows: Sequence[Row], makespan: float, path: str, modules: Sequence[str]) -> None:
    """Draw rows into a picture.

    Args:
        rows: Rows from `gather_rows`.
        makespan: Length of the step.
        path: Path of the picture.
        modules: Names of the modules, the target's last.

    Raises:
        ValueError: matplotlib is missing, or the file cannot be written.
    """
    # In shortest passes, so that the unit of the costs does not matter.
    width = min(_MOST_INCHES, max(_LEAST_INCHES, makespan / _shortest(rows) * _INCHES_OF_PASS))
    height = min(_MOST_INCHES, _INCHES_AROUND + _INCHES_OF_ROW * len(rows))
    figure = picture.blank(figsize=(width, height))
    axes = figure.subplots()
    colors = compute_colors(modules)
    seen = set()
    for y, row in enumerate(rows):
        for event in row.drawn:
            kind, length = _kind(event), event.end - event.start
            seen.add(kind)
            axes.barh(
                y,
                length,
                left=event.start,
                height=0.8,
                color=colors[kind],
                edgecolor="white",
            )
            if length / makespan * width < _INCHES_OF_NUMBER * len(str(event.action.microbatch)):
                continue
            axes.text(
                event.start + length / 2,
                y,
                str(event.action.microbatch),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if kind[1] and kind[0] != modules[-1] else "black",
            )
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, makespan)
    axes.set_xlabel("time")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    for kind in colors:
        if kind in seen:
            # A bar of no length, for the legend.
            axes.barh(0, 0, color=colors[kind], label=_name(kind))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(seen), frameon=False)
    picture.save(figure, path, bbox_inches="tight")


def _shortest(rows: Sequence[Row]) -> float:
    return min(event.end - event.start for row in rows for event in row.drawn)


def cell_letters(modules: Sequence[str]) -> dict[str, str]:
    """A short name for each module, in capitals: as many of its letters as tell it from others."""
    return {
        name: next(
            name[:length].upper()
            for length in range(1, len(name) + 1)
            if length == len(name)
            or not any(other.startswith(name[:length]) for other in modules if other != name)
        )
        for name in modules
    }


def _kind(event: Event) -> tuple[str, bool]:
    return event.action.module, event.action.kind is Kind.BACKWARD


def _name(kind: tuple[str, bool]) -> str:
    return f"{kind[0]} {'backward' if kind[1] else 'forward'}"


def _cell(event: Event, letters: Mapping[str, str]) -> str:
    letter = letters[event.action.module]
    forward = event.action.kind is Kind.FORWARD
    return f"{letter if forward else letter.lower()}{event.action.microbatch}"


def _stages(layout: Layout, rank: int) -> str:
    return " + ".join(f"{module} stage {stage}" for module, stage in layout.stages_of(rank))


def _in_flight(events: Sequence[Event]) -> dict[str, int]:
    trained = {event.action.module for event in events if event.action.kind is Kind.BACKWARD}
    most: dict[str, int] = {}
    alive: dict[str, int] = {}
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
