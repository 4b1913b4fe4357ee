"""What a microbatch moves over the bridge, as one rank sees it; integers, known before the step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_mimo.bridge.check import View
from megatron_mimo.bridge.manifest import Manifest
from megatron_mimo.bridge.plan import BridgePlanner, ModulePlan, NetworkRows
from megatron_mimo.topology import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class StepManifest:
    """What a rank knows of the rows of one microbatch.

    Attributes:
        entries: Of every lane that the rank takes part in.
        network_rows: Of every lane, where `BridgePlanner.needs_network_rows`.
        keys: Lane -> keys of its samples; the check compares them.
    """

    entries: Manifest
    network_rows: NetworkRows | None = None
    keys: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def view(self, lane: int, rows: int) -> View:
        """What the rank believes of a message of a lane's rows."""
        return View(
            lane=lane,
            keys=self.keys.get(lane, ()),
            images=tuple(
                (entry.encoder_rank, entry.rows, entry.sequence, entry.start)
                for entry in self.entries
                if entry.lane == lane
            ),
            rows=rows,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """One microbatch.

    Attributes:
        manifest: What it was planned from.
        encodes: Whether this rank's encoder has rows of it.
        takes_rows: Whether this rank's lane takes rows in it.
        source: Messages of the side that produces rows; None without rows, or on another stage.
        target: Messages of the side that uses them; None without rows, or on another stage.
    """

    manifest: StepManifest
    encodes: bool
    takes_rows: bool
    source: ModulePlan | None
    target: ModulePlan | None


def plan_crossing(
    layout: Layout, rank: int, planner: BridgePlanner, manifest: StepManifest
) -> Crossing:
    """Plan one microbatch for one rank.

    Args:
        layout: Both grids.
        rank: Global rank.
        planner: Of the rows.
        manifest: What the rank knows.
    """
    encoder, llm = layout.encoder, layout.llm
    encodes = takes_rows = False
    source = target = None
    if encoder is not None and rank in encoder.ranks:
        place = encoder.coordinates(rank)
        encodes = any(e.rows for e in manifest.entries if e.encoder_rank == place.dp)
        if encodes and place.pp == encoder.pp - 1:
            source = planner.encoder_plan(rank, manifest.entries)
    if encoder is not None and rank in llm.ranks:
        place = llm.coordinates(rank)
        takes_rows = any(e.rows for e in manifest.entries if e.lane == place.dp)
        if takes_rows and place.pp == 0:
            target = planner.language_plan(rank, manifest.entries, manifest.network_rows)
    return Crossing(
        manifest=manifest, encodes=encodes, takes_rows=takes_rows, source=source, target=target
    )
