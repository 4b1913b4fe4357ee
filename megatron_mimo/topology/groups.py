"""Process groups of every module, built once from the layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mimo.topology.layout import Layout
from megatron_mimo.topology.spec import AXES, EXPERT_AXES, GridCoordinates, ModuleGridSpec

# Each field of a ProcessGroupCollection, the view and the axes that it spans, in the order of
# creation. It must be the same on every rank: creating a group is a collective of the world.
_FIELDS: tuple[tuple[str, str | None, tuple[str, ...]], ...] = (
    ("tp", None, ("tp",)),
    ("cp", None, ("cp",)),
    ("dp", None, ("dp",)),
    ("pp", None, ("pp",)),
    ("tp_cp", None, ("tp", "cp")),
    ("mp", None, ("tp", "pp")),
    ("dp_cp", None, ("cp", "dp")),
    ("tp_dp_cp", None, ("tp", "cp", "dp")),
    ("intra_dist_opt", None, ("tp", "cp", "dp", "pp")),
    ("ep", "expert", ("ep",)),
    ("expt_tp", "expert", ("expt_tp",)),
    ("expt_dp", "expert", ("expt_dp",)),
    ("tp_ep", "expert", ("expt_tp", "ep")),
    ("tp_ep_pp", "expert", ("expt_tp", "ep", "pp")),
)

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
        spec: The module's grid.
        place: This rank's coordinates in it.
        pg_collection: Every group that megatron-core asks for; complete.
    """

    spec: ModuleGridSpec
    place: GridCoordinates
    pg_collection: ProcessGroupCollection

    @property
    def everyone(self) -> dist.ProcessGroup:
        """The group of all the ranks of the module's grid."""
        group: dist.ProcessGroup = self.pg_collection.intra_dist_opt
        return group

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
    """World groups of the messages over a boundary, one for each direction.

    NCCL runs the operations of a group in order, so a receive that was posted ahead would hold a
    send of the same group back. A rank therefore only sends or only receives in each of them: both
    directions are apart, and so are the boundaries in front of and behind a stage.

    Attributes:
        forward: Rows and hidden states.
        backward: Their gradients.
    """

    forward: dist.ProcessGroup
    backward: dist.ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The layout and the groups of the modules that this rank holds.

    Attributes:
        layout: Both grids.
        rank: This global rank.
        encoder: Groups of the encoder; None on ranks outside its grid.
        llm: Groups of the language model; None on ranks outside its grid.
        control: gloo group of the world for small host tensors (counts, digests, agreements); it
            never touches a device stream.
        bridge: Groups of the boundary between the modules.
        pipelines: Module name -> groups of the boundaries between its stages: boundary `k`, behind
            stage `k`, uses number `k % 2`. Empty for a module of one stage.
    """

    layout: Layout
    rank: int
    encoder: ModuleGroups | None
    llm: ModuleGroups | None
    control: dist.ProcessGroup
    bridge: BoundaryGroups
    pipelines: Mapping[str, tuple[BoundaryGroups, ...]]

    @property
    def is_logging_rank(self) -> bool:
        """Whether this is `Layout.logging_rank`."""
        return self.rank == self.layout.logging_rank

    @property
    def role(self) -> str:
        """This rank's role in words."""
        return self.layout.describe_rank(self.rank)


def build_topology(layout: Layout, *, timeout: timedelta | None = None) -> Topology:
    """Create every group of every grid.

    Collective: all ranks of the world call it with an equal layout.

    Args:
        layout: Both grids.
        timeout: Longest wait of an operation of these groups; None is torch's own, which differs
            by backend. Groups do not inherit it from the default one.

    Raises:
        RuntimeError: The started world has another size than the layout.
    """
    if dist.get_world_size() != layout.world_size:
        raise RuntimeError(
            f"the layout is for {layout.world_size} ranks, but {dist.get_world_size()} are running"
        )
    rank = dist.get_rank()
    groups = {grid.name: _build_module(grid, rank, timeout) for grid in layout.grids}
    return Topology(
        layout=layout,
        rank=rank,
        encoder=groups.get("encoder"),
        llm=groups[layout.llm.name],
        control=dist.new_group(backend="gloo", timeout=timeout, group_desc="control"),
        bridge=_boundary_groups("bridge", timeout),
        pipelines={
            grid.name: tuple(_boundary_groups(f"{grid.name} stages {k}", timeout) for k in range(2))
            if grid.pp > 1
            else ()
            for grid in layout.grids
        },
    )


def _boundary_groups(name: str, timeout: timedelta | None) -> BoundaryGroups:
    forward = dist.new_group(timeout=timeout, group_desc=f"{name} forward")
    backward = dist.new_group(timeout=timeout, group_desc=f"{name} backward")
    for group in (forward, backward):
        # NCCL needs one collective of the whole group before batches of some of its ranks.
        dist.barrier(group)
    return BoundaryGroups(forward=forward, backward=backward)


def _build_module(
    spec: ModuleGridSpec, rank: int, timeout: timedelta | None
) -> ModuleGroups | None:
    grid = HyperCommGrid(list(spec.shape), list(AXES), rank_offset=spec.offset)
    grid.register_view("expert", list(spec.expert_shape), list(EXPERT_AXES), shared_dims=["pp"])
    groups: dict[str, dist.ProcessGroup | None] = {
        name: grid.create_pg(list(axes), view=view, timeout=timeout) for name, view, axes in _FIELDS
    }
    if spec.name == "llm":
        groups |= _embedding_groups(spec, timeout)
    else:
        # Only a language model may tie its embeddings; None tells megatron-core so.
        groups |= {"embd": None, "pos_embd": None}
    if rank not in spec.ranks:
        return None
    groups |= {name: groups[source] for name, source in _SYNONYMS.items()}
    return ModuleGroups(
        spec=spec, place=spec.coordinates(rank), pg_collection=ProcessGroupCollection(**groups)
    )


def _embedding_groups(
    spec: ModuleGridSpec, timeout: timedelta | None
) -> dict[str, dist.ProcessGroup | None]:
    """Groups that tie the first and the last stage's embeddings; None on the stages between."""
    pipelines = list(spec.groups("pp"))
    both_ends = [sorted({ranks[0], ranks[-1]}) for ranks in pipelines]
    first = [[ranks[0]] for ranks in pipelines]
    embd, _ = dist.new_subgroups_by_enumeration(
        both_ends, timeout=timeout, group_desc=f"{spec.name} embd"
    )
    pos_embd, _ = dist.new_subgroups_by_enumeration(
        first, timeout=timeout, group_desc=f"{spec.name} pos_embd"
    )
    return {"embd": embd, "pos_embd": pos_embd}
