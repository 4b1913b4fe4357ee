"""Items run where there is least to do: ranks that read agree a step ahead, and move contents.

Each rank that reads has drawn the samples of its lanes, and decoded the items whose lanes it
serves. Then, in the thread that draws:

1. one exchange tells every rank of a component the sizes of all items, and whether the readers of
   a lane have drawn the same;
2. every rank computes who runs which item (`topology.dispatch.assign_balanced`);
3. contents go from ranks that have them to ranks that run them. Both ends know from the sizes what
   is sent, one message for each pair of ranks at most;
4. every rank makes its share of the manifest.

No rank waits for one that has left. A rank that cannot draw a step, or takes no further one, says
so in place of the sizes, and then every rank of the component does as it does.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mimo.bridge.manifest import Manifest, ManifestEntry
from megatron_mimo.data.inputs import Inputs
from megatron_mimo.data.loader.announcement import (
    TYPES,
    Announcement,
    Kind,
    KnownItem,
    LaneReport,
    Table,
    report_items,
)
from megatron_mimo.data.loader.batch import ModuleDispatch, NetworkRows, StepDispatch
from megatron_mimo.data.loader.component import Component, components
from megatron_mimo.data.loader.drawn import (
    Dispatched,
    Dispatcher,
    DrawnStep,
    EndOfSteps,
    ItemPlace,
    LaneDispatcher,
    LaneSamples,
    Share,
    ShareMaker,
    Work,
)
from megatron_mimo.data.loader.exchange import Exchange, build_exchange
from megatron_mimo.data.loader.wire import Parcel, WireTypes, decode, encode, parcel
from megatron_mimo.data.role import DataRole
from megatron_mimo.topology import Domain, Layout, assign_balanced, assign_items

# Operations of an item, forward and backward, from its lengths and its number of rows.
ItemCost = Callable[[tuple[int, ...], int], int]
# Rows that the dp ranks of a source send to each lane, by (dp rank, lane), from a manifest and the
# documents of its lanes.
CountRows = Callable[[Manifest, Mapping[int, tuple[int, ...]]], Mapping[tuple[int, int], int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig:
    """How items are shared out, equal on every rank.

    Attributes:
        costs: Source -> operations of an item.
        window: Number of microbatches whose items are shared out together.
        count_rows: Source -> function that counts rows on the network, for sources of whose rows
            lanes must know each other's numbers.
        validate: Whether a later check names what readers of a lane have drawn differently.
        describe: Function that returns the role of a rank in words.
    """

    costs: Mapping[str, ItemCost]
    window: int = 1
    count_rows: Mapping[str, CountRows] = field(default_factory=dict)
    validate: bool = True
    describe: Callable[[int], str] = str


class _Run(NamedTuple):
    """An item, and the dp rank that runs it."""

    item: KnownItem
    dp: int


class BalancedDispatcher(Dispatcher):
    """Shares out items by their cost; one for each rank that reads, all of which call it alike.

    Args:
        component: Ranks that decide together, this one among them.
        exchange: Groups of these ranks.
        inputs: Kinds of items of the run.
        config: How items are shared out.
    """

    def __init__(
        self, component: Component, exchange: Exchange, inputs: Inputs, config: BalanceConfig
    ) -> None:
        self._component, self._exchange, self._config = component, exchange, config
        self._inputs = inputs
        self._rank = exchange.rank
        self._role = component.roles[self._rank]
        self._by_lane = LaneDispatcher(self._role)
        self._types = WireTypes.of_items(inputs, *TYPES)
        self._spoken = [lane for lane in self._role.lanes if component.speaker(lane) == self._rank]
        self._left = False

    def dispatch(self, drawn: DrawnStep) -> Dispatched:
        """See `Dispatcher.dispatch`. Collective over the ranks of the component.

        Raises:
            ValueError: Another rank cannot draw the step, or readers of a lane have drawn different
                samples and nothing else would find it.
            EndOfSteps: Another rank takes no further step.
        """
        try:
            parcels = self._parcels(drawn)
            announcement = self._announcement(drawn, parcels)
        except Exception as error:
            self.fail(error)
            raise
        begin = time.perf_counter()
        table = self._tell(announcement)
        spans = [(begin, time.perf_counter())]
        parted = table.parted()
        if parted:
            return self._undecided(drawn, parted)
        runs = {source: self._decide(source, table) for source in self._component.domains}
        begin = time.perf_counter()
        arrived = self._move(runs, parcels)
        spans.append((begin, time.perf_counter()))
        return Dispatched(
            shares=self._shares(drawn, table, runs, arrived),
            balanced=True,
            report=StepDispatch(
                reader=self._rank, modules=dict(self._report(drawn, runs)), spans=tuple(spans)
            ),
        )

    def fail(self, error: Exception) -> None:
        """See `Dispatcher.fail`."""
        self._leave(Announcement(kind=Kind.FAILED, text=str(error) or type(error).__name__))

    def end(self) -> None:
        """See `Dispatcher.end`."""
        self._leave(Announcement(kind=Kind.END))

    def _leave(self, last: Announcement) -> None:
        if not self._left:
            self._left = True
            self._exchange.tell(encode(last, self._types, "announcement"))

    def _tell(self, announcement: Announcement) -> Table:
        """Exchange announcements of a step."""
        messages = self._exchange.tell(encode(announcement, self._types, "announcement"))
        told: dict[int, Announcement] = {
            rank: decode(message, self._types) for rank, message in messages.items()
        }
        if any(each.kind == Kind.END for each in told.values()):
            # Who ends has taken all steps of the run, so that nobody needs this one.
            self._left = True
            raise EndOfSteps
        for rank, each in told.items():
            if each.kind == Kind.FAILED:
                self._left = True
                raise ValueError(
                    f"rank {rank} ({self._config.describe(rank)}), which reads for this step: "
                    f"{each.text}"
                )
        return Table(told)

    def _undecided(self, drawn: DrawnStep, parted: Mapping[int, Mapping[int, int]]) -> Dispatched:
        """The step by lanes, where readers of a lane disagree; nothing moves."""
        if not self._config.validate:
            self._left = True
            lanes = ", ".join(map(str, parted))
            ranks = ", ".join(f"{r} ({self._config.describe(r)})" for r in parted[min(parted)])
            raise ValueError(
                f"ranks {ranks} read other samples for lanes {lanes}, so that they cannot share "
                f"out the items: leave out --no-validate-data-alignment to see the first "
                f"difference, or pass --encoder-dispatch lane"
            )
        return replace(self._by_lane.dispatch(drawn), balanced=True)

    def _parcels(self, drawn: DrawnStep) -> dict[str, list[Parcel | None]]:
        """Source -> its items as they would travel; None without content."""
        try:
            return {
                source: [
                    parcel(tuple(item.work), self._types, f"item of {source}")
                    if source in self._role.runs
                    else None
                    for item in drawn.items[source]
                ]
                for source in self._component.domains
            }
        except TypeError as error:
            raise TypeError(f"{error}; with --encoder-dispatch lane no item is sent") from error

    def _announcement(
        self, drawn: DrawnStep, parcels: Mapping[str, Sequence[Parcel | None]]
    ) -> Announcement:
        component, reports = self._component, []
        for source in component.domains:
            kind, cost = self._inputs[source], self._config.costs[source]
            known: dict[int, list[KnownItem]] = {
                lane: []
                for lane in self._role.lanes
                if component.tellers[source, lane] == self._rank
            }
            for item, its_parcel in zip(drawn.items[source], parcels[source], strict=True):
                if item.place.lane in known and its_parcel is not None:
                    of_item = cost(kind.lengths(item.work.item), item.work.item.rows)
                    known[item.place.lane].append(KnownItem(item.place, of_item, its_parcel.nbytes))
            reports += [report_items(source, lane, items) for lane, items in known.items()]
        return Announcement(
            kind=Kind.STEP,
            digests=drawn.digests,
            lanes=tuple(
                LaneReport(lane=lane, samples=tuple(drawn.samples[lane])) for lane in self._spoken
            ),
            items=tuple(reports),
        )

    def _decide(self, source: str, table: Table) -> list[_Run]:
        """Who runs which item of a source, of all lanes, in canonical order."""
        found: list[_Run] = []
        done: dict[int, int] = {}
        for items in _windows(table.items(source), self._config.window):
            ranks: dict[ItemPlace, int] = {}
            for domain in self._component.domains[source]:
                lanes = set(domain.lanes)
                inside = [item for item in items if item.place.lane in lanes]
                ranks |= zip(
                    (item.place for item in inside),
                    self._assign(source, domain, inside, [done.get(dp, 0) for dp in domain.ranks]),
                    strict=True,
                )
            for item in items:
                dp = ranks[item.place]
                done[dp] = done.get(dp, 0) + item.cost
                found.append(_Run(item, dp))
        return found

    def _assign(
        self, source: str, domain: Domain, items: Sequence[KnownItem], earlier: Sequence[int]
    ) -> Sequence[int]:
        return assign_balanced(
            [item.cost for item in items],
            [item.nbytes for item in items],
            [self._component.homes[source, item.place.lane] for item in items],
            domain.ranks,
            earlier,
        )

    def _move(
        self, runs: Mapping[str, Sequence[_Run]], parcels: Mapping[str, Sequence[Parcel | None]]
    ) -> dict[tuple[str, ItemPlace], Work]:
        """Send items that others run, and receive those that this rank runs and has not drawn."""
        outgoing: dict[int, list[Parcel]] = {}
        incoming: dict[int, list[tuple[str, KnownItem]]] = {}
        for source, of_source in runs.items():
            own = iter(parcels[source])
            for item, dp in of_source:
                drawn = next(own) if item.place.lane in self._role.lanes else None
                for sender, receiver in self._routes(source, item.place.lane, dp):
                    if sender == self._rank:
                        assert drawn is not None, (source, item.place)
                        outgoing.setdefault(receiver, []).append(drawn)
                    if receiver == self._rank:
                        incoming.setdefault(sender, []).append((source, item))
        messages = self._exchange.move(
            {receiver: _joined(each) for receiver, each in outgoing.items()},
            {sender: sum(i.nbytes for _, i in each) for sender, each in incoming.items()},
        )
        arrived: dict[tuple[str, ItemPlace], Work] = {}
        for sender, expected in incoming.items():
            start = 0
            for source, item in expected:
                buffer = messages[sender][start : start + item.nbytes]
                arrived[source, item.place] = Work(*decode(buffer, self._types))
                start += item.nbytes
        return arrived

    def _routes(self, source: str, lane: int, dp: int) -> Iterator[tuple[int, int]]:
        """(sender, receiver) of an item's content to each reader of the dp rank that runs it."""
        component = self._component
        homes = component.homes[source, lane]
        if dp in homes:
            return
        senders = component.readers_of[source, homes[0]]
        for number, receiver in enumerate(component.readers_of[source, dp]):
            if lane not in component.roles[receiver].lanes:
                yield senders[number % len(senders)], receiver

    def _shares(
        self,
        drawn: DrawnStep,
        table: Table,
        runs: Mapping[str, Sequence[_Run]],
        arrived: Mapping[tuple[str, ItemPlace], Work],
    ) -> tuple[Share, ...]:
        """This rank's share of each microbatch."""
        makers = [ShareMaker() for _ in range(drawn.num_microbatches)]
        # Of a lane whose items it runs, a rank needs all of them: of other sources too, so that it
        # knows a lane as a whole or not at all.
        taking_part = {
            (item.place.microbatch, item.place.lane)
            for source, of_source in runs.items()
            for item, dp in of_source
            if dp == self._role.sources[source].rank
        }
        for source, role in self._role.sources.items():
            if source not in runs:
                self._by_lane.add(source, drawn, makers)
                continue
            own = iter(drawn.items[source])
            for item, dp in runs[source]:
                m, lane = item.place.microbatch, item.place.lane
                read = lane in self._role.lanes
                work = next(own).work if read else arrived.get((source, item.place))
                if read or (m, lane) in taking_part:
                    makers[m].add(source, item.place, dp)
                if dp == role.rank:
                    assert work is not None, (source, item.place)
                    makers[m].run(source, work)
        rows = self._network_rows(drawn.num_microbatches, table, runs)
        return tuple(
            maker.share(self._samples(m, table, maker.lanes), rows[m])
            for m, maker in enumerate(makers)
        )

    def _samples(self, microbatch: int, table: Table, others: set[int]) -> dict[int, LaneSamples]:
        """Samples of a microbatch, of the lanes that this rank reads and of others."""
        lanes = sorted(others.union(self._role.lanes))
        return {lane: table.samples[lane][microbatch] for lane in lanes}

    def _network_rows(
        self, num_microbatches: int, table: Table, runs: Mapping[str, Sequence[_Run]]
    ) -> list[dict[str, NetworkRows]]:
        """Rows on the network in each microbatch, of dp ranks that this rank's lane takes from."""
        lane = self._role.text_lane
        found: list[dict[str, NetworkRows]] = [{} for _ in range(num_microbatches)]
        for source, count in self._config.count_rows.items():
            entries: list[list[ManifestEntry]] = [[] for _ in range(num_microbatches)]
            givers = {(i.place.microbatch, dp) for i, dp in runs[source] if i.place.lane == lane}
            for item, dp in runs[source]:
                if (item.place.microbatch, dp) in givers:
                    entries[item.place.microbatch] += item.place.entries(source, dp)
            for m, of_microbatch in enumerate(entries):
                documents = {
                    lane: samples[m].lengths
                    for lane, samples in table.samples.items()
                    if samples[m].lengths
                }
                counts = count(tuple(of_microbatch), documents)
                found[m][source] = tuple((dp, to, rows) for (dp, to), rows in counts.items())
        return found

    def _report(
        self, drawn: DrawnStep, runs: Mapping[str, Sequence[_Run]]
    ) -> Iterator[tuple[str, ModuleDispatch]]:
        """How the items of each source that this rank runs were shared out."""
        for source, of_source in runs.items():
            role = self._role.sources[source]
            if role.rank is None:
                continue
            served: dict[tuple[int, int], list[int]] = {}
            as_run = [0] * drawn.num_microbatches
            largest = [0] * drawn.num_microbatches
            received = 0
            for item, dp in of_source:
                m, lane = item.place.microbatch, item.place.lane
                served.setdefault((m, lane), []).append(item.cost)
                if dp == role.rank:
                    as_run[m] += item.cost
                    largest[m] = max(largest[m], item.cost)
                    received += item.nbytes * (lane not in self._role.lanes)
            by_lane = [0] * drawn.num_microbatches
            for (m, lane), costs in served.items():
                serving = role.serving.get(lane, ())
                if role.rank in serving:
                    ranks = assign_items(len(costs), serving, m)
                    by_lane[m] += sum(
                        cost for cost, dp in zip(costs, ranks, strict=True) if dp == role.rank
                    )
            yield (
                source,
                ModuleDispatch(
                    by_lane=tuple(by_lane),
                    as_run=tuple(as_run),
                    largest=tuple(largest),
                    received=received,
                ),
            )


def build_dispatcher(
    layout: Layout, roles: Sequence[DataRole], rank: int, inputs: Inputs, config: BalanceConfig
) -> BalancedDispatcher | None:
    """The dispatcher of a rank that reads, where a source has domains; else None.

    Collective over the world, with equal arguments but for the rank.

    Args:
        layout: The grids of all modules.
        roles: Data role of every rank.
        rank: Global rank of this process.
        inputs: Kinds of items of the run.
        config: How items are shared out.
    """
    found = components(layout, roles)
    exchange = build_exchange(found, rank)
    if exchange is None:
        return None
    component = next(each for each in found if rank in each.roles)
    return BalancedDispatcher(component, exchange, inputs, config)


def _windows(items: Sequence[KnownItem], size: int) -> Iterator[list[KnownItem]]:
    """Items of each `size` microbatches that follow each other."""
    windows: dict[int, list[KnownItem]] = {}
    for item in items:
        windows.setdefault(item.place.microbatch // size, []).append(item)
    yield from windows.values()


def _joined(parcels: Sequence[Parcel]) -> Tensor:
    """One message of several parcels, uint8 [n]."""
    message = torch.zeros(sum(each.nbytes for each in parcels), dtype=torch.uint8)
    start = 0
    for each in parcels:
        each.write(message[start : start + each.nbytes])
        start += each.nbytes
    return message
