"""Transfers of a microbatch over the bridges, as one rank sees them; integers, known ahead."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_mimo.bridge.check import View
from megatron_mimo.bridge.manifest import Documents, Manifest
from megatron_mimo.bridge.plan import BridgePlanner, NetworkRows, RankPlan
from megatron_mimo.topology import Layout, ModuleGridSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class MicrobatchManifest:
    """What a rank knows of the rows of one microbatch.

    Attributes:
        entries: Manifest entries of every lane that the rank takes part in.
        network_rows: Source name -> number of its rows of every lane, for the sources for which
            `BridgePlanner.needs_network_rows` holds.
        keys: Lane -> keys of its samples, which the check compares.
        documents: Lane -> number of tokens of each document of its packed sequence, for every lane
            of the entries; empty without packing.
    """

    entries: Manifest
    network_rows: Mapping[str, NetworkRows] = field(default_factory=dict)
    keys: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    documents: Documents = field(default_factory=dict)

    def view(self, source: str, lane: int, rows: int) -> View:
        """What the rank expects of a message of a lane's rows."""
        return View(
            lane=lane,
            keys=self.keys.get(lane, ()),
            items=tuple(
                (entry.source_rank, entry.rows, entry.sequence, entry.start)
                for entry in self.entries
                if entry.module == source and entry.lane == lane
            ),
            documents=self.documents.get(lane, ()),
            rows=rows,
            known=lane in self.keys,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgePlan:
    """Transfers of one microbatch over one edge.

    Attributes:
        produces: Whether this rank's replica of the source has rows of the microbatch.
        takes: Whether this rank's lane uses rows of the microbatch.
        source: Messages of the side that produces rows; None without rows, or on another stage.
        target: Messages of the side that uses rows; None without rows, or on another stage.
    """

    produces: bool = False
    takes: bool = False
    source: RankPlan | None = None
    target: RankPlan | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MicrobatchPlan:
    """Transfers of one microbatch over all edges.

    Attributes:
        manifest: Manifest that the plan was made from.
        edges: Source name -> transfers over its bridge.
    """

    manifest: MicrobatchManifest
    edges: Mapping[str, EdgePlan]


def plan_microbatch(
    layout: Layout, rank: int, planners: Mapping[str, BridgePlanner], manifest: MicrobatchManifest
) -> MicrobatchPlan:
    """Plan one microbatch for one rank.

    Args:
        layout: The grids of all modules.
        rank: Global rank to plan for.
        planners: Source name -> planner of its bridge.
        manifest: Rows of the microbatch, as the rank knows them.
    """
    edges = {
        source: _plan_edge(layout, rank, layout.modules[source], planner, manifest)
        for source, planner in planners.items()
    }
    return MicrobatchPlan(manifest=manifest, edges=edges)


def _plan_edge(
    layout: Layout,
    rank: int,
    grid: ModuleGridSpec,
    planner: BridgePlanner,
    manifest: MicrobatchManifest,
) -> EdgePlan:
    target, entries = layout.target, tuple(planner.entries(manifest.entries))
    produces = takes = False
    outgoing = incoming = None
    if rank in grid.ranks:
        place = grid.coordinates(rank)
        produces = any(entry.source_rank == place.dp for entry in entries)
        if produces and place.pp == grid.pp - 1:
            outgoing = planner.source_plan(rank, entries, manifest.documents)
    if rank in target.ranks:
        place = target.coordinates(rank)
        takes = any(entry.lane == place.dp for entry in entries)
        if takes and place.pp == 0:
            incoming = planner.target_plan(
                rank, entries, manifest.network_rows.get(grid.name), manifest.documents
            )
    return EdgePlan(produces=produces, takes=takes, source=outgoing, target=incoming)
