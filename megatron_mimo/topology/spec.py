"""The shape of one module's process grid, as integers.

Nothing here imports torch: grids can be described, checked and printed without a process.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megatron_mimo.settings import Within
from megatron_mimo.settings.ranges import MOST_RANKS

SIZES = Within(1, MOST_RANKS)
"""Sizes along an axis."""
OFFSETS = Within(0, MOST_RANKS)
"""First ranks of grids."""
# Fastest-varying axis first, as megatron-core's default order "tp-cp-ep-dp-pp" has it.
AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("expt_tp", "ep", "expt_dp", "pp")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleGridSpec:
    """Parallel sizes of one module and the first global rank of its grid.

    Attributes:
        name: Name of the module.
        offset: First global rank of the grid.
        tp: Tensor-parallel size, ranks.
        cp: Context-parallel size, ranks.
        dp: Data-parallel size, replicas.
        pp: Number of pipeline stages.
        ep: Expert-parallel size: number of ranks that the experts are distributed over.
        expt_tp: Tensor-parallel size inside an expert, ranks.
        flag_form: Format of the flag of an axis in error messages.

    Raises:
        ValueError: A size, the offset or the number of ranks is out of bounds, or the ranks of a
            pipeline stage cannot be cut into `expt_tp x ep` blocks.
    """

    name: str
    offset: int = 0
    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    expt_tp: int = 1
    flag_form: str = "--{name}-{axis}"

    def __post_init__(self) -> None:
        for axis in ("tp", "cp", "dp", "pp", "ep", "expt_tp"):
            size = getattr(self, axis)
            if not SIZES.admits(size):
                raise ValueError(f"{self.flag(axis)} is {size}: expected {SIZES.expected}")
        if not OFFSETS.admits(self.offset):
            raise ValueError(f"{self.flag('offset')} is {self.offset}: expected {OFFSETS.expected}")
        if self.size > MOST_RANKS:
            raise ValueError(
                f"the {self.name} grid has {self.size:,} ranks (tp {self.tp} x cp {self.cp} x "
                f"dp {self.dp} x pp {self.pp}): expected at most {MOST_RANKS:,}"
            )
        if self.stage_size % (self.expt_tp * self.ep):
            raise ValueError(
                f"{self.flag('expt_tp')} {self.expt_tp} x {self.flag('ep')} {self.ep} does not "
                f"divide the {self.stage_size} ranks of a pipeline stage (tp {self.tp} x "
                f"cp {self.cp} x dp {self.dp}): change one of them"
            )

    def flag(self, axis: str) -> str:
        """The command-line flag of an axis, for error messages."""
        return self.flag_form.format(name=self.name, axis=axis.replace("_", "-"))

    @property
    def size(self) -> int:
        """Number of ranks in the grid."""
        return self.stage_size * self.pp

    @property
    def stage_size(self) -> int:
        """Number of ranks that hold one pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def expt_dp(self) -> int:
        """Number of replicas of an expert."""
        return self.stage_size // (self.expt_tp * self.ep)

    @property
    def ranks(self) -> range:
        """Global ranks of the grid."""
        return range(self.offset, self.offset + self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes along `AXES`."""
        return (self.tp, self.cp, self.dp, self.pp)

    @property
    def expert_shape(self) -> tuple[int, ...]:
        """Sizes along `EXPERT_AXES`."""
        return (self.expt_tp, self.ep, self.expt_dp, self.pp)

    def coordinates(self, rank: int) -> "GridCoordinates":
        """Coordinates of a global rank in the dense and in the expert view.

        Raises:
            ValueError: The rank is outside the grid.
        """
        if rank not in self.ranks:
            raise ValueError(f"rank {rank} is not in the {self.name} grid {self.span}")
        index = rank - self.offset
        tp, cp, dp, pp = _unravel(index, self.shape)
        expt_tp, ep, expt_dp, _ = _unravel(index, self.expert_shape)
        return GridCoordinates(tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, expt_tp=expt_tp, expt_dp=expt_dp)

    def rank(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """Global rank at the given dense coordinates.

        Raises:
            ValueError: A coordinate is outside its axis.
        """
        index, stride = 0, 1
        for axis, size, value in zip(AXES, self.shape, (tp, cp, dp, pp), strict=True):
            if not 0 <= value < size:
                raise ValueError(f"{self.name} {axis} rank {value}: expected 0 to {size - 1}")
            index += value * stride
            stride *= size
        return self.offset + index

    def stage_ranks(self, *, dp: int, pp: int) -> list[int]:
        """The cp and tp ranks of one dp rank on a pipeline stage, ascending."""
        return [
            self.rank(dp=dp, pp=pp, cp=cp, tp=tp) for cp in range(self.cp) for tp in range(self.tp)
        ]

    def groups(self, *axes: str) -> Iterator[tuple[int, ...]]:
        """Global ranks of every group that spans `axes` of one of the views, each ascending."""
        seen: dict[tuple[int, ...], list[int]] = {}
        view = AXES if set(axes) <= set(AXES) else EXPERT_AXES
        for rank in self.ranks:
            place = self.coordinates(rank)
            fixed = tuple(getattr(place, axis) for axis in view if axis not in axes)
            seen.setdefault(fixed, []).append(rank)
        return (tuple(ranks) for ranks in seen.values())

    @property
    def span(self) -> str:
        """The grid's ranks as a half-open interval, for errors and tables."""
        return f"[{self.offset}, {self.offset + self.size})"


@dataclass(frozen=True, kw_only=True, slots=True)
class GridCoordinates:
    """Position of one rank in its module's grid, along each axis of both views."""

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    expt_tp: int
    expt_dp: int


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    assert 0 <= index < prod(shape), (index, shape)
    place = []
    for size in shape:
        index, coordinate = divmod(index, size)
        place.append(coordinate)
    return tuple(place)
