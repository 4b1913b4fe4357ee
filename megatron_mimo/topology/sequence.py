"""Which positions of a sequence each rank of a pipeline stage holds; integers only."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

Interval = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SequenceSharding:
    """How the cp and tp ranks of one lane share the positions of a sequence.

    Context parallelism cuts a sequence into `2 * cp` chunks; rank `c` holds chunks `c` and
    `2 * cp - 1 - c`, one after the other, so that causal attention costs every rank the same (the
    zig-zag order of Transformer Engine and megatron-core). Sequence parallelism then divides the
    positions of a cp rank evenly over its tp ranks. Without it every tp rank holds all of them.

    A *shard* is the set of positions that one (cp, tp) rank holds; tp ranks with equal positions
    have the same shard.

    Attributes:
        seq_length: Number of positions of a sequence, S.
        cp: Context-parallel size, ranks.
        tp: Tensor-parallel size, ranks.
        sequence_parallel: Whether the tp ranks divide the positions among them.

    Raises:
        ValueError: The sequence does not divide evenly; the message names the flags.
    """

    seq_length: int
    cp: int = 1
    tp: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.cp > 1 and self.seq_length % (2 * self.cp):
            raise ValueError(
                f"--seq-length {self.seq_length} does not divide by 2 x --llm-cp {self.cp}: "
                f"context parallelism gives each rank two equal chunks; change one of them"
            )
        if self.sequence_parallel and self.local_length % self.tp:
            raise ValueError(
                f"--seq-length {self.seq_length}"
                + (f" over --llm-cp {self.cp}" if self.cp > 1 else "")
                + f" does not divide by --llm-tp {self.tp}: sequence parallelism cuts the "
                f"sequence evenly; change one, or pass --no-sequence-parallel"
            )

    @property
    def local_length(self) -> int:
        """Number of positions of a cp rank, before sequence parallelism divides them."""
        return self.seq_length // self.cp

    @property
    def shard_length(self) -> int:
        """Number of positions of a shard."""
        return self.local_length // (self.tp if self.sequence_parallel else 1)

    @property
    def num_shards(self) -> int:
        """Number of different shards."""
        return self.cp * (self.tp if self.sequence_parallel else 1)

    def shard(self, *, cp_rank: int, tp_rank: int) -> int:
        """Number of the shard that a rank holds."""
        return cp_rank * self.tp + tp_rank if self.sequence_parallel else cp_rank

    def cp_intervals(self, cp_rank: int) -> tuple[Interval, ...]:
        """Half-open global positions of a cp rank, ascending, which is its local order."""
        if self.cp == 1:
            return ((0, self.seq_length),)
        chunk = self.seq_length // (2 * self.cp)
        return tuple((i * chunk, (i + 1) * chunk) for i in (cp_rank, 2 * self.cp - 1 - cp_rank))

    def intervals(self, shard: int) -> tuple[Interval, ...]:
        """Half-open global positions of a shard, ascending, which is its local order."""
        if not self.sequence_parallel:
            return self.cp_intervals(shard)
        cp_rank, tp_rank = divmod(shard, self.tp)
        size = self.shard_length
        return cut(self.cp_intervals(cp_rank), tp_rank * size, (tp_rank + 1) * size)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut an interval of positions by shard: (shard, start, stop), ascending."""
        for piece_start, piece_stop, shard in self._owners:
            low, high = max(start, piece_start), min(stop, piece_stop)
            if low < high:
                yield shard, low, high

    @cached_property
    def _owners(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, shard) of every interval of every shard, ascending by position."""
        return tuple(
            sorted(
                (start, stop, shard)
                for shard in range(self.num_shards)
                for start, stop in self.intervals(shard)
            )
        )


def cut(intervals: tuple[Interval, ...], start: int, stop: int) -> tuple[Interval, ...]:
    """The part of concatenated intervals from offset `start` to offset `stop`."""
    part = []
    offset = 0
    for low, high in intervals:
        first, last = max(start - offset, 0), min(stop - offset, high - low)
        if first < last:
            part.append((low + first, low + last))
        offset += high - low
    return tuple(part)
