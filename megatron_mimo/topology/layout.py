"""How the grids of the modules share the ranks, and which replicas serve which lanes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from megatron_mimo.topology.spec import ModuleGridSpec


class Edge(NamedTuple):
    """A connection between two modules: rows of the source become a part of the target's input.

    Attributes:
        source: Name of the module that produces the rows.
        target: Name of the module that uses the rows.
    """

    source: str
    target: str


class StageId(NamedTuple):
    """A pipeline stage of a module.

    Attributes:
        module: Name of the module.
        stage: Number of the stage, from 0.
    """

    module: str
    stage: int


class Domain(NamedTuple):
    """Dp ranks of a source that may run each other's items.

    Attributes:
        ranks: The dp ranks, ascending.
        lanes: The lanes that they serve, ascending.
    """

    ranks: tuple[int, ...]
    lanes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The grids of all modules by name, the edges between them, and the world they must cover.

    One module, the *target*, is fed by all others, the *sources*: it is the language model, and
    each of its data-parallel ranks is a *lane*. Grids may overlap in any way, as long as every rank
    of the world holds at least one module.

    Attributes:
        modules: Grid of each module by its name, in the order in which groups are built.
        edges: Connections from each source to the target.
        world_size: Number of started ranks.
        domains: Source -> its domains, for sources whose items are shared out by their cost among
            the dp ranks of a domain; each dp rank and each lane is in one. Items of other sources
            run where their lane is served.

    Raises:
        ValueError: The edges do not all lead to one target, or a grid needs more ranks than were
            started, or no grid uses some ranks; the message names the ranks and the flags.
    """

    modules: Mapping[str, ModuleGridSpec]
    edges: tuple[Edge, ...]
    world_size: int
    domains: Mapping[str, tuple[Domain, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, *grids: ModuleGridSpec, world_size: int) -> Self:
        """A layout in which all grids feed the last one."""
        *sources, target = grids
        names = [grid.name for grid in grids]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"module {twice[0]!r} has two grids: expected one for each module")
        return cls(
            modules={grid.name: grid for grid in grids},
            edges=tuple(Edge(grid.name, target.name) for grid in sources),
            world_size=world_size,
        )

    def __post_init__(self) -> None:
        self._check_edges()
        for grid in self.modules.values():
            if grid.ranks.stop > self.world_size:
                lower = _above_least(self.modules.values(), grid)
                raise ValueError(
                    f"{grid.name} grid {grid.span} needs ranks up to {grid.ranks.stop - 1}, but "
                    f"only {self.world_size} were started: start {grid.ranks.stop} ranks"
                    + (f", or lower {' or '.join(lower)}" if lower else "")
                )
        used = {rank for grid in self.modules.values() for rank in grid.ranks}
        left = [rank for rank in range(self.world_size) if rank not in used]
        if left:
            names = " and ".join(f"{grid.name} grid {grid.span}" for grid in self.modules.values())
            fewer = "" if left[0] < len(used) else f"start {len(used)} ranks, or "
            flags = " or ".join(grid.flag("…") for grid in self.modules.values())
            raise ValueError(
                f"{names} {'leave' if len(self.modules) > 1 else 'leaves'} ranks "
                f"{_intervals(left)} unused: {fewer}change sizes or offsets with {flags}"
            )

    def _check_edges(self) -> None:
        for name, grid in self.modules.items():
            if grid.name != name:
                raise ValueError(f"module {name!r} has the grid of {grid.name!r}: expected its own")
        unknown = [name for edge in self.edges for name in edge if name not in self.modules]
        if unknown:
            raise ValueError(
                f"an edge names module {unknown[0]!r}: expected {', '.join(self.modules)}"
            )
        sources = [edge.source for edge in self.edges]
        targets = [name for name in self.modules if name not in sources]
        if len(targets) != 1 or any(edge.target != targets[0] for edge in self.edges):
            raise ValueError(
                f"{', '.join(f'{a} -> {b}' for a, b in self.edges) or 'no edge'} between modules "
                f"{', '.join(self.modules)}: expected one module that all others feed"
            )
        if len(set(sources)) < len(sources):
            raise ValueError("a module feeds the target twice: expected one edge for each")

    @property
    def target(self) -> ModuleGridSpec:
        """Grid of the module that all others feed: the language model."""
        sources = {edge.source for edge in self.edges}
        (target,) = (grid for name, grid in self.modules.items() if name not in sources)
        return target

    @property
    def sources(self) -> tuple[ModuleGridSpec, ...]:
        """Grids of the modules that feed the target."""
        return tuple(self.modules[edge.source] for edge in self.edges)

    @property
    def num_lanes(self) -> int:
        """Number of data-parallel replicas of the target."""
        return self.target.dp

    @property
    def logging_rank(self) -> int:
        """The rank that reports: tp and cp rank 0 of lane 0's last pipeline stage."""
        return self.target.rank(pp=self.target.pp - 1)

    def shares_ranks(self, first: str, second: str) -> bool:
        """Whether two modules have a rank in common."""
        one, other = self.modules[first].ranks, self.modules[second].ranks
        return max(one.start, other.start) < min(one.stop, other.stop)

    def stages_of(self, rank: int) -> tuple[StageId, ...]:
        """The pipeline stages that a global rank holds, in the order of the modules."""
        return tuple(
            StageId(name, grid.coordinates(rank).pp)
            for name, grid in self.modules.items()
            if rank in grid.ranks
        )

    def serving(self, source: str, lane: int) -> tuple[int, ...]:
        """The dp ranks of a source that serve a lane, ascending.

        Contiguous blocks: with `E` dp ranks of the source and `L` lanes, lane `l` is served by rank
        `l * E // L` when `E <= L` (fan-out), else by the ranks `e` with `e * L // E == l` (fan-in).
        The sizes need not divide each other.

        Args:
            source: Name of a module that feeds the target.
            lane: Number of the lane.

        Raises:
            ValueError: There is no such lane.
        """
        if not 0 <= lane < self.num_lanes:
            raise ValueError(f"lane {lane}: expected 0 to {self.num_lanes - 1}")
        size, lanes = self.modules[source].dp, self.num_lanes
        if size <= lanes:
            return (lane * size // lanes,)
        return tuple(dp for dp in range(size) if dp * lanes // size == lane)

    def served(self, source: str, dp: int) -> tuple[int, ...]:
        """Lanes that a dp rank of a source serves, ascending."""
        return tuple(lane for lane in range(self.num_lanes) if dp in self.serving(source, lane))

    def domain(self, source: str, lane: int) -> Domain | None:
        """The domain of a source that has a lane; None where items run where lanes are served."""
        domains = self.domains.get(source, ())
        return next((domain for domain in domains if lane in domain.lanes), None)

    def runners(self, source: str, lane: int) -> tuple[int, ...]:
        """The dp ranks of a source that may run items of a lane, ascending."""
        domain = self.domain(source, lane)
        return self.serving(source, lane) if domain is None else domain.ranks

    def reached(self, source: str, dp: int) -> tuple[int, ...]:
        """Lanes whose items a dp rank of a source may run, ascending."""
        domains = self.domains.get(source, ())
        found = next((domain.lanes for domain in domains if dp in domain.ranks), None)
        return self.served(source, dp) if found is None else found

    def producers(self, source: str, dp: int) -> list[int]:
        """Ranks of a source's last stage that hold the rows of one of its dp ranks."""
        grid = self.modules[source]
        return grid.stage_ranks(dp=dp, pp=grid.pp - 1)

    def users(self, lane: int) -> list[int]:
        """Ranks of the target's first stage that use the rows of a lane."""
        return self.target.stage_ranks(dp=lane, pp=0)

    def neighbourhoods(self, source: str) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Sets of replicas that exchange rows over an edge, as (dp ranks of the source, lanes).

        No rank outside such a set exchanges rows with a rank inside.
        """
        size, lanes = self.modules[source].dp, self.num_lanes
        if source in self.domains:
            yield from self.domains[source]
        elif size <= lanes:
            for dp in range(size):
                yield (dp,), self.served(source, dp)
        else:
            for lane in range(lanes):
                yield self.serving(source, lane), (lane,)

    def describe_rank(self, rank: int) -> str:
        """The role of a global rank in words: "encoder dp 0 tp 1, llm dp 0"."""
        parts = []
        for grid in self.modules.values():
            if rank in grid.ranks:
                place = grid.coordinates(rank)
                axes = " ".join(
                    f"{axis} {getattr(place, axis)}"
                    for axis in ("dp", "pp", "cp", "tp")
                    if axis == "dp" or getattr(grid, axis) > 1
                )
                parts.append(f"{grid.name} {axes}")
        return ", ".join(parts)

    def table(self) -> str:
        """The layout as text for the start-up log."""
        width = max(8, *(len(name) for name in self.modules))
        lines = [
            f"layout: {self.world_size} ranks, {self._kind}",
            f"  {'module':<{width}} ranks          tp   cp   pp   dp   ep  expt_tp  expt_dp",
        ]
        lines += [
            f"  {g.name:<{width}} {g.span:<12} {g.tp:>4} {g.cp:>4} {g.pp:>4} {g.dp:>4} {g.ep:>4}"
            f" {g.expt_tp:>8} {g.expt_dp:>8}"
            for g in self.modules.values()
        ]
        for source in self.sources:
            # A line for each dp rank is readable up to a node's worth of them.
            shown = min(source.dp, 16)
            for dp in range(shown):
                lanes = ", ".join(str(lane) for lane in self.served(source.name, dp))
                lines.append(f"  {source.name} dp {dp} serves {self.target.name} lanes {lanes}")
            if shown < source.dp:
                lines.append(f"  ... and {source.dp - shown} more {source.name} dp ranks")
            if source.name in self.domains:
                sizes = [len(domain.ranks) for domain in self.domains[source.name]]
                among = f"{sizes[0]}" if len(sizes) == 1 else f"groups of {max(sizes)}"
                lines.append(
                    f"  items of {source.name} are shared out by their cost among {among} dp ranks"
                )
        return "\n".join(lines)

    @property
    def _kind(self) -> str:
        """Relation between the grids in words: disjoint, overlapping or colocated."""
        names = list(self.modules)
        if len(names) == 1:
            return "language model only"
        if len({grid.ranks for grid in self.modules.values()}) == 1:
            return "colocated grids"
        pairs = [(a, b) for i, a in enumerate(names) for b in names[:i]]
        overlap = any(self.shares_ranks(a, b) for a, b in pairs)
        return "grids that share ranks" if overlap else "disjoint grids"


def assign_items(num_items: int, serving: tuple[int, ...], microbatch: int) -> tuple[int, ...]:
    """Which dp rank of a source runs each item of one lane's microbatch.

    Contiguous runs of items, the starting rank rotated by the microbatch index so that lanes with
    fewer items than serving ranks still keep all of them busy over a step.

    Args:
        num_items: Number of items of the lane in this microbatch, in sample order.
        serving: The dp ranks that serve the lane, from `Layout.serving`.
        microbatch: Index of the microbatch within the step.
    """
    k = len(serving)
    return tuple(serving[(microbatch + i * k // num_items) % k] for i in range(num_items))


def _above_least(grids: Iterable[ModuleGridSpec], last: ModuleGridSpec) -> list[str]:
    """Flags whose lower value moves the end of a grid down, with their values."""
    flags = []
    for grid in grids:
        # Grids without an offset follow each other, so that those before count too.
        if grid.ranks.stop <= last.ranks.stop:
            sizes = {axis: getattr(grid, axis) for axis in ("tp", "cp", "pp", "dp")}
            flags += [f"{grid.flag(a)} (now {size})" for a, size in sizes.items() if size > 1]
    if last.offset:
        flags.append(f"{last.flag('offset')} (now {last.offset})")
    return flags


def _intervals(ranks: list[int]) -> str:
    """Ascending ranks as half-open intervals: [0, 1, 4] -> "[0, 2), [4, 5)"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank:
            runs[-1][1] = rank + 1
        else:
            runs.append([rank, rank + 1])
    return ", ".join(f"[{start}, {stop})" for start, stop in runs)
