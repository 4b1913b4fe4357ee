"""What ranks that read tell each other of a step before they decide who runs which item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mimo.data.loader.drawn import ItemPlace, LaneSamples


class Kind(StrEnum):
    """What an announcement says."""

    STEP = "step"
    """The rank has drawn a step."""
    END = "end"
    """It takes no further step, and expects none of the others."""
    FAILED = "failed"
    """It cannot draw a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneReport:
    """The samples of a lane, from the rank that speaks for it.

    Attributes:
        lane: Number of the lane.
        samples: Its samples by microbatch.
    """

    lane: int
    samples: tuple[LaneSamples, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemReport:
    """The items of a source in a lane, from a rank that has their content.

    Attributes:
        source: Name of the source.
        lane: Number of the lane.
        items: (microbatch, sequence, cost in operations, bytes of the content, number of runs) of
            each item, in canonical order, int64 [N, 5].
        runs: (position of the first row, number of rows) of each run, int64 [R, 2].
    """

    source: str
    lane: int
    items: Tensor
    runs: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement:
    """What one rank tells.

    Attributes:
        kind: One of `Kind`.
        text: Reason of a failure; else empty.
        digests: Lane -> hash of all that its readers must agree on.
        lanes: Lanes that the rank speaks for.
        items: Items that it tells of.
    """

    kind: str
    text: str = ""
    digests: Mapping[int, int] = field(default_factory=dict)
    lanes: tuple[LaneReport, ...] = ()
    items: tuple[ItemReport, ...] = ()


TYPES = (Announcement, LaneReport, ItemReport, LaneSamples)
"""The types that an announcement is made of."""


class KnownItem(NamedTuple):
    """An item that a rank knows of.

    Attributes:
        place: Where its rows stand.
        cost: Operations of its module, forward and backward.
        nbytes: Number of bytes of its content as it travels.
    """

    place: ItemPlace
    cost: int
    nbytes: int


def report_items(source: str, lane: int, items: Sequence[KnownItem]) -> ItemReport:
    """A report of a source's items in a lane, in canonical order."""
    rows = [
        (item.place.microbatch, item.place.sequence, item.cost, item.nbytes, len(item.place.runs))
        for item in items
    ]
    runs = [run for item in items for run in item.place.runs]
    return ItemReport(
        source=source,
        lane=lane,
        items=torch.tensor(rows, dtype=torch.int64).view(-1, 5),
        runs=torch.tensor(runs, dtype=torch.int64).view(-1, 2),
    )


def read_items(report: ItemReport) -> list[KnownItem]:
    """The items of a report."""
    runs = [(start, count) for start, count in report.runs.tolist()]
    found, first = [], 0
    for microbatch, sequence, cost, nbytes, number in report.items.tolist():
        place = ItemPlace(microbatch, report.lane, sequence, tuple(runs[first : first + number]))
        found.append(KnownItem(place, cost, nbytes))
        first += number
    return found


class Table:
    """All that the ranks of a component have told of a step.

    Args:
        told: Rank -> its announcement of a step.
    """

    def __init__(self, told: Mapping[int, Announcement]) -> None:
        self._told = told
        self.samples: dict[int, tuple[LaneSamples, ...]] = {
            report.lane: report.samples for each in told.values() for report in each.lanes
        }
        self._items: dict[str, list[KnownItem]] = {}
        for each in told.values():
            for report in each.items:
                self._items.setdefault(report.source, []).extend(read_items(report))
        for items in self._items.values():
            # Within a lane they are in order already.
            items.sort(key=lambda item: (item.place.microbatch, item.place.lane))

    def items(self, source: str) -> Sequence[KnownItem]:
        """The items of a source in all lanes, in canonical order."""
        return self._items.get(source, ())

    def parted(self) -> dict[int, dict[int, int]]:
        """Lane -> digest by rank, for lanes whose readers have drawn different samples."""
        by_lane: dict[int, dict[int, int]] = {}
        for rank, each in self._told.items():
            for lane, digest in each.digests.items():
                by_lane.setdefault(lane, {})[rank] = digest
        return {
            lane: by_rank for lane, by_rank in by_lane.items() if len(set(by_rank.values())) > 1
        }
