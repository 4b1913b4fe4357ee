"""Which process groups there are, who is in them and what travels in them, before any is made.

Tensors of the device travel in groups of the device's own backend, NCCL on a GPU, and nothing else
does. Tensors of the hosts and Python objects travel over gloo, in groups that exist for them. A
group of both kinds would have a mesh of sockets that nobody uses, and a barrier of it would run on
the hosts without creating NCCL's communicator.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from megatron_mimo.topology.layout import Layout
from megatron_mimo.topology.spec import ModuleGridSpec

HOST_BACKEND = "gloo"
"""Backend of all groups of the hosts, the world's own among them."""

# Each field of a ProcessGroupCollection and the axes that it spans, in the order of creation.
FIELDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("tp", ("tp",)),
    ("cp", ("cp",)),
    ("dp", ("dp",)),
    ("pp", ("pp",)),
    ("tp_cp", ("tp", "cp")),
    ("mp", ("tp", "pp")),
    ("dp_cp", ("cp", "dp")),
    ("tp_dp_cp", ("tp", "cp", "dp")),
    ("intra_dist_opt", ("tp", "cp", "dp", "pp")),
    ("ep", ("ep",)),
    ("expt_tp", ("expt_tp",)),
    ("expt_dp", ("expt_dp",)),
    ("tp_ep", ("expt_tp", "ep")),
    ("tp_ep_pp", ("expt_tp", "ep", "pp")),
)

# Context-parallel attention may send keys and values around a ring.
_WITH_MESSAGES = ("cp",)

# Besides those that are planned here: the world's own group, and that of checkpoints.
_OTHER_WORLD_WIDE = 2

Sets = tuple[tuple[int, ...], ...]


class Carries(Enum):
    """What travels in a group.

    Messages between some of the ranks ask for two things. NCCL makes the communicator of a group in
    its first operation, which all ranks must take part in, so a reduction by all comes first. Two
    ranks that gloo connects lazily wait for each other, so it connects all pairs at once.
    """

    DEVICE = "tensors of the device, in operations of all ranks"
    MESSAGES = "tensors of the device, between some of the ranks too"
    HOST = "tensors of the hosts, and objects"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedGroup:
    """The groups of one purpose.

    Attributes:
        name: Unique name, such as "llm tp" or "bridge of vision forward".
        sets: Global ranks of each group, ascending. A rank is in at most one of them. A set of one
            rank needs no group of its own.
        carries: What travels in them.
    """

    name: str
    sets: Sets
    carries: Carries

    def backend(self, device_backend: str) -> str:
        """Backend of the groups, where the device's own is `device_backend`."""
        return HOST_BACKEND if self.carries is Carries.HOST else device_backend

    def set_of(self, rank: int) -> tuple[int, ...] | None:
        """The set that has a rank; None without one."""
        return next((ranks for ranks in self.sets if rank in ranks), None)


def field_group(module: str, field: str) -> str:
    """Name of the group that is a field of a module's collection."""
    return f"{module} {field}"


def stage_hosts(module: str) -> str:
    """Name of the group of the hosts of each stage of a module."""
    return f"{module} stage hosts"


def boundary_groups(name: str) -> tuple[str, str]:
    """Names of both directions of a boundary."""
    return f"{name} forward", f"{name} backward"


def bridge_name(source: str) -> str:
    """Name of the bridge of a source."""
    return f"bridge of {source}"


def stages_name(module: str, parity: int) -> str:
    """Name of the boundaries of even or of odd number between the stages of a module."""
    return f"{module} stages {parity}"


CONTROL = "control"


def planned_groups(layout: Layout) -> tuple[PlannedGroup, ...]:
    """Every group of a topology, in the order of creation.

    It is the same on every rank, since creating a group is a collective of the world.
    """
    planned = []
    for grid in layout.modules.values():
        planned += _module_groups(grid, ties=grid is layout.target)
    for source in layout.sources:
        planned += _boundary(bridge_name(source.name), tuple(bridge_ranks(layout, source.name)))
    for name, grid in layout.modules.items():
        for parity in range(2) if grid.pp > 1 else ():
            planned += _boundary(stages_name(name, parity), tuple(grid.groups("pp")))
    world = tuple(range(layout.world_size))
    return (*planned, PlannedGroup(name=CONTROL, sets=(world,), carries=Carries.HOST))


def _module_groups(grid: ModuleGridSpec, *, ties: bool) -> list[PlannedGroup]:
    fields = {name: tuple(grid.groups(*axes)) for name, axes in FIELDS}
    if ties:
        # Only a language model may tie its embeddings: on its first and its last stage.
        ends = [tuple(dict.fromkeys((ranks[0], ranks[-1]))) for ranks in fields["pp"]]
        fields["embd"] = tuple(ends)
        fields["pos_embd"] = tuple(ranks[:1] for ranks in ends)
    planned = [
        PlannedGroup(
            name=field_group(grid.name, field),
            sets=sets,
            carries=Carries.MESSAGES if field in _WITH_MESSAGES else Carries.DEVICE,
        )
        for field, sets in fields.items()
    ]
    stages = tuple(grid.groups("tp", "cp", "dp"))
    planned.append(PlannedGroup(name=stage_hosts(grid.name), sets=stages, carries=Carries.HOST))
    return planned


def _boundary(name: str, sets: Sets) -> list[PlannedGroup]:
    return [
        PlannedGroup(name=direction, sets=sets, carries=Carries.MESSAGES)
        for direction in boundary_groups(name)
    ]


def bridge_ranks(layout: Layout, source: str) -> list[tuple[int, ...]]:
    """Sets of ranks that exchange rows over a bridge, each in ascending order.

    Where grids overlap, a rank may produce rows for some lanes and use rows of another replica of
    the source: sets with a rank in common are merged into one.
    """
    sets: list[set[int]] = []
    for replicas, lanes in layout.neighbourhoods(source):
        ranks = {rank for dp in replicas for rank in layout.producers(source, dp)}
        ranks |= {rank for lane in lanes for rank in layout.users(lane)}
        for other in [known for known in sets if known & ranks]:
            sets.remove(other)
            ranks |= other
        sets.append(ranks)
    return sorted(tuple(sorted(ranks)) for ranks in sets)


def group_sizes(layout: Layout, rank: int, peers: int) -> Mapping[Carries, list[int]]:
    """Number of ranks of every process group that a rank is in, by what travels in it.

    Args:
        layout: The grids of all modules.
        rank: Global rank.
        peers: Number of ranks that need the same data as this one, itself included.
    """
    sizes: dict[Carries, list[int]] = {
        # One for all groups of a single rank.
        Carries.DEVICE: [1],
        Carries.MESSAGES: [],
        Carries.HOST: [layout.world_size] * _OTHER_WORLD_WIDE + [1, peers],
    }
    for group in planned_groups(layout):
        ranks = group.set_of(rank)
        if ranks is not None and len(ranks) > 1:
            sizes[group.carries].append(len(ranks))
    return sizes
