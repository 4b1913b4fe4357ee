"""Process groups of every module, built once from the layout."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mimo.runtime import Device
from megatron_mimo.runtime.open_files import connected_at_once
from megatron_mimo.topology.group_plan import (
    CONTROL,
    FIELDS,
    HOST_BACKEND,
    Carries,
    PlannedGroup,
    boundary_groups,
    bridge_name,
    field_group,
    planned_groups,
    stage_hosts,
    stages_name,
)
from megatron_mimo.topology.layout import Layout
from megatron_mimo.topology.spec import GridCoordinates, ModuleGridSpec

_HOST = Device("cpu")

# megatron-core asks for these under other names; without weight rematerialisation and with one
# optimizer instance they are the same groups.
_SYNONYMS = {
    "dp_cp_gtp_remat": "dp_cp",
    "intra_dp_cp": "dp_cp",
    "expt_dp_gtp_remat": "expt_dp",
    "intra_expt_dp": "expt_dp",
    "tp_ep_pp_with_egtp_remat": "tp_ep_pp",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleGroups:
    """One module's groups, as seen by a rank of its grid.

    Attributes:
        spec: Grid of the module.
        place: Coordinates of this rank in the grid.
        pg_collection: Groups of the module, for tensors of the device alone; every group that
            megatron-core asks for is set.
        stage_hosts: gloo group of the ranks of this rank's pipeline stage, for host tensors and
            objects.
    """

    spec: ModuleGridSpec
    place: GridCoordinates
    pg_collection: ProcessGroupCollection
    stage_hosts: dist.ProcessGroup

    @property
    def answers_for_replica(self) -> bool:
        """Whether this rank reports for its data-parallel replica of the module; one rank does."""
        return (self.place.tp, self.place.cp, self.place.pp) == (0, 0, 0)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the module's first pipeline stage."""
        return self.place.pp == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the module's last pipeline stage."""
        return self.place.pp == self.spec.pp - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundaryGroups:
    """Groups of the messages over a boundary, one for each direction.

    Each spans the ranks that exchange messages over the boundary, and no others. NCCL runs the
    operations of a group in order, so a receive that was posted early would delay a send of the
    same group. A rank therefore only sends or only receives in each group: the two directions have
    separate groups, and so have the boundaries before and after a stage.

    Attributes:
        forward: Group of the messages with rows or hidden states.
        backward: Group of the messages with their gradients.
    """

    forward: dist.ProcessGroup
    backward: dist.ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The layout and the groups of the modules that this rank holds.

    Attributes:
        layout: The grids of all modules.
        rank: Global rank of this process.
        modules: Module name -> its groups, for the modules that this rank holds.
        control: gloo group of the world for small host tensors (counts, digests, agreements); it
            never touches a device stream.
        bridges: Source name -> groups of the bridge along its edge, for the edges with an end on
            this rank.
        pipelines: Module name -> groups of the boundaries between its stages, for the modules that
            this rank holds and that have several stages. Boundary `k`, after stage `k`, uses the
            groups with index `k % 2`.
    """

    layout: Layout
    rank: int
    modules: Mapping[str, ModuleGroups]
    control: dist.ProcessGroup
    bridges: Mapping[str, BoundaryGroups]
    pipelines: Mapping[str, tuple[BoundaryGroups, ...]]

    @property
    def target(self) -> ModuleGroups | None:
        """Groups of the language model; None on ranks outside of its grid."""
        return self.modules.get(self.layout.target.name)

    @property
    def is_logging_rank(self) -> bool:
        """Whether this is `Layout.logging_rank`."""
        return self.rank == self.layout.logging_rank

    @property
    def role(self) -> str:
        """Role of this rank in words, for messages."""
        return self.layout.describe_rank(self.rank)


def build_topology(
    layout: Layout, *, device: Device = _HOST, timeout: timedelta | None = None
) -> Topology:
    """Create every group of every grid, as `planned_groups` has them.

    Collective: all ranks of the world call it with an equal layout.

    Args:
        layout: The grids of all modules.
        device: Device of this rank, whose backend the groups have in which its tensors travel.
        timeout: Longest time that an operation of these groups waits; None for torch's default,
            which differs by backend. Groups do not inherit the timeout of the default group.

    Raises:
        RuntimeError: The number of started ranks differs from the layout's world size.
    """
    if dist.get_world_size() != layout.world_size:
        raise RuntimeError(
            f"the layout is for {layout.world_size} ranks, but {dist.get_world_size()} are running"
        )
    rank = dist.get_rank()
    maker = _Maker(rank, device, timeout)
    made = {group.name: maker.make(group) for group in planned_groups(layout)}
    control = made[CONTROL]
    assert control is not None
    return Topology(
        layout=layout,
        rank=rank,
        modules={
            name: _module(grid, rank, made)
            for name, grid in layout.modules.items()
            if rank in grid.ranks
        },
        control=control,
        bridges={
            source.name: groups
            for source in layout.sources
            if (groups := _boundary(bridge_name(source.name), made)) is not None
        },
        pipelines={
            name: tuple(
                groups
                for parity in range(2)
                if (groups := _boundary(stages_name(name, parity), made)) is not None
            )
            for name, grid in layout.modules.items()
            if grid.pp > 1 and rank in grid.ranks
        },
    )


class _Maker:
    """Makes the groups that are planned; all ranks make all of them, in the same order."""

    def __init__(self, rank: int, device: Device, timeout: timedelta | None) -> None:
        self._rank = rank
        self._device = device
        self._timeout = timeout
        self._alone: dict[str, dist.ProcessGroup] = {}

    def make(self, planned: PlannedGroup) -> dist.ProcessGroup | None:
        """The group of this rank; None where it is in none."""
        backend = planned.backend(self._device.backend)
        has_messages = planned.carries is Carries.MESSAGES
        mine: dist.ProcessGroup | None = None
        for ranks in planned.sets:
            if len(ranks) == 1:
                continue
            with connected_at_once() if has_messages else nullcontext():
                group = dist.new_group(
                    list(ranks), timeout=self._timeout, backend=backend, group_desc=planned.name
                )
            mine = group if self._rank in ranks else mine
        if mine is None:
            return None if planned.set_of(self._rank) is None else self._by_itself(backend)
        if has_messages and backend != HOST_BACKEND:
            # A reduction, not a barrier, which may run elsewhere than messages do. gloo needs none:
            # its pairs are connected.
            dist.all_reduce(torch.zeros(1, device=self._device.torch), group=mine)
        return mine

    def _by_itself(self, backend: str) -> dist.ProcessGroup:
        """One for all groups of a single rank, which nothing is sent in; others need not know."""
        if backend not in self._alone:
            self._alone[backend] = dist.new_group(
                [self._rank],
                timeout=self._timeout,
                backend=backend,
                use_local_synchronization=True,
                group_desc="alone",
            )
        return self._alone[backend]


_Made = Mapping[str, dist.ProcessGroup | None]


def _module(grid: ModuleGridSpec, rank: int, made: _Made) -> ModuleGroups:
    """Groups of a module on a rank of its grid."""
    fields = {name: made[field_group(grid.name, name)] for name, _ in FIELDS}
    # None tells megatron-core that no embeddings are tied, or not on this stage.
    fields |= {name: made.get(field_group(grid.name, name)) for name in ("embd", "pos_embd")}
    fields |= {name: fields[source] for name, source in _SYNONYMS.items()}
    hosts = made[stage_hosts(grid.name)]
    assert hosts is not None
    return ModuleGroups(
        spec=grid,
        place=grid.coordinates(rank),
        pg_collection=ProcessGroupCollection(**fields),
        stage_hosts=hosts,
    )


def _boundary(name: str, made: _Made) -> BoundaryGroups | None:
    forward, backward = (made[direction] for direction in boundary_groups(name))
    if forward is None or backward is None:
        return None
    return BoundaryGroups(forward=forward, backward=backward)
