"""How the encoder's and the language model's grids share the world, and who serves whom."""

from dataclasses import dataclass

from megatron_mimo.topology.spec import ModuleGridSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Both grids and the world they must cover.

    The grids are either disjoint and cover every rank, or *colocated*: they span the same ranks,
    all of them. Without an encoder the language model's grid covers every rank.

    Attributes:
        encoder: Grid of the vision encoder and its projector; None trains the LLM alone.
        llm: Grid of the language model; each of its dp ranks is a *lane*.
        world_size: Number of started ranks.

    Raises:
        ValueError: The grids overlap in part, pass the end of the world, or leave ranks over;
            the message names the ranks and the flags.
    """

    encoder: ModuleGridSpec | None
    llm: ModuleGridSpec
    world_size: int

    def __post_init__(self) -> None:
        for grid in self.grids:
            if grid.ranks.stop > self.world_size:
                raise ValueError(
                    f"{grid.name} grid {grid.span} needs ranks up to {grid.ranks.stop - 1}, but "
                    f"only {self.world_size} were started: start {grid.ranks.stop} ranks, or "
                    f"lower one of {_size_flags(grid)}"
                )
        if self.encoder is not None and not self.colocated:
            _refuse_overlap(self.encoder, self.llm)
        used = {rank for grid in self.grids for rank in grid.ranks}
        left = [rank for rank in range(self.world_size) if rank not in used]
        if left:
            names = " and ".join(f"{grid.name} grid {grid.span}" for grid in self.grids)
            raise ValueError(
                f"{names} {'leave' if self.encoder else 'leaves'} ranks {_intervals(left)} unused: "
                f"start {len(used)} ranks, or change "
                f"{' or '.join(_size_flags(grid) for grid in self.grids)}"
            )

    @property
    def grids(self) -> tuple[ModuleGridSpec, ...]:
        """The grids in the order in which every rank builds their groups."""
        return (self.llm,) if self.encoder is None else (self.encoder, self.llm)

    @property
    def colocated(self) -> bool:
        """Whether both modules live on the same ranks."""
        return self.encoder is not None and self.encoder.ranks == self.llm.ranks

    @property
    def num_lanes(self) -> int:
        """Number of data-parallel replicas of the language model."""
        return self.llm.dp

    @property
    def logging_rank(self) -> int:
        """The rank that reports: tp and cp rank 0 of lane 0's last pipeline stage."""
        return self.llm.rank(pp=self.llm.pp - 1)

    def serving(self, lane: int) -> tuple[int, ...]:
        """Encoder dp ranks that serve a lane, ascending; empty without an encoder.

        Contiguous blocks: with `E` encoder dp ranks and `L` lanes, lane `l` is served by rank
        `l * E // L` when `E <= L` (fan-out), else by the ranks `e` with `e * L // E == l` (fan-in).
        The sizes need not divide each other.
        """
        if not 0 <= lane < self.num_lanes:
            raise ValueError(f"lane {lane}: expected 0 to {self.num_lanes - 1}")
        if self.encoder is None:
            return ()
        encoder_dp, lanes = self.encoder.dp, self.num_lanes
        if encoder_dp <= lanes:
            return (lane * encoder_dp // lanes,)
        return tuple(e for e in range(encoder_dp) if e * lanes // encoder_dp == lane)

    def served(self, encoder_rank: int) -> tuple[int, ...]:
        """Lanes that an encoder dp rank serves, ascending."""
        return tuple(lane for lane in range(self.num_lanes) if encoder_rank in self.serving(lane))

    def describe_rank(self, rank: int) -> str:
        """The role of a global rank in words: "encoder dp 0 tp 1, llm dp 0"."""
        parts = []
        for grid in self.grids:
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
        kind = "colocated" if self.colocated else "disjoint"
        lines = [
            f"layout: {self.world_size} ranks, "
            + (f"{kind} grids" if self.encoder else "language model only"),
            "  module   ranks          tp   cp   pp   dp   ep  expt_tp  expt_dp",
        ]
        lines += [
            f"  {g.name:<8} {g.span:<12} {g.tp:>4} {g.cp:>4} {g.pp:>4} {g.dp:>4} {g.ep:>4}"
            f" {g.expt_tp:>8} {g.expt_dp:>8}"
            for g in self.grids
        ]
        if self.encoder is not None:
            # A line per encoder dp rank is readable up to a node's worth of them.
            shown = min(self.encoder.dp, 16)
            for e in range(shown):
                lanes = ", ".join(str(lane) for lane in self.served(e))
                lines.append(f"  encoder dp {e} serves llm lanes {lanes}")
            if shown < self.encoder.dp:
                lines.append(f"  ... and {self.encoder.dp - shown} more encoder dp ranks")
        return "\n".join(lines)


def assign_images(num_images: int, serving: tuple[int, ...], microbatch: int) -> tuple[int, ...]:
    """Which encoder dp rank runs each image of one lane's microbatch.

    Contiguous runs of images, the starting rank rotated by the microbatch index so that lanes with
    fewer images than encoder ranks still keep all of them busy over a step.

    Args:
        num_images: Images of the lane in this microbatch, in sample order.
        serving: Encoder dp ranks of the lane, from `Layout.serving`.
        microbatch: Index of the microbatch within the step.
    """
    k = len(serving)
    return tuple(serving[(microbatch + i * k // num_images) % k] for i in range(num_images))


def _refuse_overlap(encoder: ModuleGridSpec, llm: ModuleGridSpec) -> None:
    shared = [rank for rank in encoder.ranks if rank in llm.ranks]
    if shared:
        raise ValueError(
            f"encoder grid {encoder.span} and llm grid {llm.span} overlap on ranks "
            f"{_intervals(shared)}: expected disjoint grids, or two grids over the same ranks; "
            f"change {encoder.flag('offset')}, {llm.flag('offset')} or the grids' sizes"
        )


def _size_flags(grid: ModuleGridSpec) -> str:
    return ", ".join(f"{grid.flag(a)} (now {getattr(grid, a)})" for a in ("tp", "cp", "pp", "dp"))


def _intervals(ranks: list[int]) -> str:
    """Ascending ranks as half-open intervals: [0, 1, 4] -> "[0, 2), [4, 5)"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank:
            runs[-1][1] = rank + 1
        else:
            runs.append([rank, rank + 1])
    return ", ".join(f"[{start}, {stop})" for start, stop in runs)
