"""A step between drawing and collation: samples, items, and who runs which item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from megatron_mimo.bridge.manifest import Manifest, ManifestEntry
from megatron_mimo.data.inputs import Item
from megatron_mimo.data.loader.batch import NetworkRows, StepDispatch
from megatron_mimo.data.role import DataRole
from megatron_mimo.topology import assign_items


class ItemPlace(NamedTuple):
    """Where the rows of an item stand.

    Attributes:
        microbatch: Index of its microbatch in the step.
        lane: Lane whose tokens hold the item.
        sequence: Index of its sequence in the lane's microbatch.
        runs: (position of the first row, number of rows) of each piece of the item.
    """

    microbatch: int
    lane: int
    sequence: int
    runs: tuple[tuple[int, int], ...]

    def entries(self, module: str, rank: int) -> list[ManifestEntry]:
        """Entries of the manifest, where dp rank `rank` of a module runs the item."""
        return [
            ManifestEntry(
                module=module,
                source_rank=rank,
                lane=self.lane,
                rows=count,
                sequence=self.sequence,
                start=start,
            )
            for start, count in self.runs
        ]


class Work(NamedTuple):
    """An item as the rank that runs it needs it.

    Attributes:
        item: Encoded item.
        seed: Seed of its augmentation.
    """

    item: Item
    seed: int


class PlacedItem(NamedTuple):
    """An item of a lane that this rank reads.

    Attributes:
        place: Where its rows stand.
        work: The item, which has content where this rank runs its module.
    """

    place: ItemPlace
    work: Work


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneSamples:
    """The samples of a lane's microbatch.

    Attributes:
        keys: Keys of the samples.
        starts: (sequence, position) at which each of them begins.
        lengths: Number of tokens of each document of a packed sequence, and of the padding after
            them; empty without packing.
    """

    keys: tuple[str, ...]
    starts: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnStep:
    """What a rank has drawn for a step.

    Attributes:
        num_microbatches: Number of microbatches of the step.
        samples: Lane -> its samples by microbatch, for the lanes that this rank reads.
        items: Module -> its items in these lanes, in canonical order: by microbatch, lane,
            sequence and position.
        digests: Lane -> hash of all that its readers must agree on.
    """

    num_microbatches: int
    samples: Mapping[int, Sequence[LaneSamples]]
    items: Mapping[str, Sequence[PlacedItem]]
    digests: Mapping[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What a rank needs of a microbatch beside its tokens.

    Attributes:
        manifest: Entries of the lanes that it takes part in.
        samples: Lane -> its samples, for these lanes.
        work: Module -> the items that this rank runs, in manifest order.
        network_rows: Numbers of rows for `Microbatch.network_rows`.
    """

    manifest: Manifest
    samples: Mapping[int, LaneSamples]
    work: Mapping[str, Sequence[Work]] = field(default_factory=dict)
    network_rows: Mapping[str, NetworkRows] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatched:
    """A step of which it is decided who runs its items.

    Attributes:
        shares: This rank's share of each microbatch.
        balanced: Whether ranks that read share out items (`StepData.balanced`).
        report: How the items were shared out; None where their lanes decided.
    """

    shares: tuple[Share, ...]
    balanced: bool = False
    report: StepDispatch | None = None


class EndOfSteps(Exception):
    """Another rank takes no further step, so that no rank needs the one that was drawn."""


class Dispatcher(Protocol):
    """Who runs which item of a step."""

    def dispatch(self, drawn: DrawnStep) -> Dispatched:
        """Decide who runs the items of a step."""
        ...

    def fail(self, error: Exception) -> None:
        """Tell the other ranks that this one cannot go on, unless they know that it has left."""
        ...

    def end(self) -> None:
        """Tell the other ranks that this one takes no further step."""
        ...


class LaneDispatcher(Dispatcher):
    """Items run where their lane is served, as `Layout.serving` says; ranks need not talk.

    Args:
        role: Part of a step that this rank needs.
    """

    def __init__(self, role: DataRole) -> None:
        self._role = role

    def dispatch(self, drawn: DrawnStep) -> Dispatched:
        """See `Dispatcher.dispatch`."""
        makers = [ShareMaker() for _ in range(drawn.num_microbatches)]
        for module in self._role.sources:
            self.add(module, drawn, makers)
        return Dispatched(
            shares=tuple(
                maker.share({lane: of_lane[m] for lane, of_lane in drawn.samples.items()})
                for m, maker in enumerate(makers)
            )
        )

    def fail(self, error: Exception) -> None:
        """No other rank waits for this one."""

    def end(self) -> None:
        """No other rank waits for this one."""

    def add(self, module: str, drawn: DrawnStep, makers: Sequence["ShareMaker"]) -> None:
        """Add the items of a module to the shares of all microbatches."""
        rank = self._role.sources[module].rank
        for (place, work), runner in self._assigned(module, drawn):
            makers[place.microbatch].add(module, place, runner)
            if runner == rank:
                makers[place.microbatch].run(module, work)

    def _assigned(self, module: str, drawn: DrawnStep) -> list[tuple[PlacedItem, int]]:
        """Items of a module, each with the dp rank that runs it."""
        together: dict[tuple[int, int], list[PlacedItem]] = {}
        for item in drawn.items[module]:
            together.setdefault((item.place.microbatch, item.place.lane), []).append(item)
        serving = self._role.sources[module].serving
        found = []
        for (microbatch, lane), items in together.items():
            ranks = assign_items(len(items), serving[lane], microbatch)
            found += list(zip(items, ranks, strict=True))
        return found


class ShareMaker:
    """Makes the share of a microbatch from items that are given in canonical order."""

    def __init__(self) -> None:
        self._entries: list[ManifestEntry] = []
        self._work: dict[str, list[Work]] = {}

    def add(self, module: str, place: ItemPlace, rank: int) -> None:
        """Add an item that dp rank `rank` of a module runs."""
        self._entries += place.entries(module, rank)

    def run(self, module: str, work: Work) -> None:
        """Add an item that this rank runs."""
        self._work.setdefault(module, []).append(work)

    @property
    def lanes(self) -> set[int]:
        """Lanes of the items."""
        return {entry.lane for entry in self._entries}

    def share(
        self,
        samples: Mapping[int, LaneSamples],
        network_rows: Mapping[str, NetworkRows] | None = None,
    ) -> Share:
        """The share.

        Args:
            samples: Lane -> its samples, for the lanes of the manifest.
            network_rows: Numbers of rows for `Microbatch.network_rows`; None for none.
        """
        entries = sorted(self._entries, key=lambda e: (e.lane, e.sequence, e.start))
        return Share(
            manifest=tuple(entries),
            samples=samples,
            work=self._work,
            network_rows=network_rows or {},
        )
