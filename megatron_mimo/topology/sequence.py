"""Which positions of a sequence each rank of a pipeline stage holds; integers only."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megatron_mimo.kernels.cut import DocumentCut, cut_documents

Interval = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SequenceSharding:
    """How the cp and tp ranks of one lane share the positions of a sequence.

    Context parallelism cuts a sequence into `2 * cp` chunks; rank `c` holds chunks `c` and
    `2 * cp - 1 - c`, one after the other, so that causal attention costs every rank the same (the
    zig-zag order of Transformer Engine and megatron-core). A packed sequence is cut by its
    documents instead (`kernels.cut`). Sequence parallelism then divides the positions of a cp rank
    evenly over its tp ranks. Without it every tp rank holds all of them.

    A *shard* is the set of positions that one (cp, tp) rank holds; tp ranks with equal positions
    have the same shard.

    Attributes:
        seq_length: Number of positions of a sequence, S.
        cp: Context-parallel size, ranks.
        tp: Tensor-parallel size, ranks.
        sequence_parallel: Whether the tp ranks divide the positions among them.
        packed: Whether the sequences of training are packed.

    Raises:
        ValueError: The sequence does not divide evenly; the message names the flags.
    """

    seq_length: int
    cp: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    packed: bool = False

    def __post_init__(self) -> None:
        if not self.packed:
            self._require_chunks()
        elif self.seq_length % self.cp:
            raise ValueError(
                f"--seq-length {self.seq_length} does not divide by --llm-cp {self.cp}: context "
                f"parallelism gives each rank as many tokens; change one of them"
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

    def of(self, documents: tuple[int, ...] = ()) -> "SequenceCut":
        """Who holds which positions of one sequence.

        Args:
            documents: Number of tokens of each document of a packed sequence, and of the padding
                after them, which sum to S; none for a sequence that is not packed.

        Raises:
            ValueError: The documents have another number of tokens than a sequence has positions,
                or a sequence that is not packed does not divide evenly.
        """
        return _cut_sequence(self, documents)

    def _require_chunks(self) -> None:
        if self.cp > 1 and self.seq_length % (2 * self.cp):
            raise ValueError(
                f"--seq-length {self.seq_length} does not divide by 2 x --llm-cp {self.cp}: "
                f"context parallelism gives each rank two equal chunks; change one of them"
            )

    def _cut(self, documents: tuple[int, ...]) -> "SequenceCut":
        if not documents:
            self._require_chunks()
            return SequenceCut(sharding=self, parts=tuple(map(self._chunks, range(self.cp))))
        if sum(documents) != self.seq_length:
            raise ValueError(
                f"documents of {sum(documents)} tokens, padding included, in a packed sequence of "
                f"{self.seq_length} positions: expected equally many"
            )
        found = cut_documents(documents, self.cp)
        return SequenceCut(sharding=self, parts=found.intervals, documents=found)

    def _chunks(self, cp_rank: int) -> tuple[Interval, ...]:
        """Positions of a cp rank in a sequence that is not packed."""
        if self.cp == 1:
            return ((0, self.seq_length),)
        chunk = self.seq_length // (2 * self.cp)
        return tuple((i * chunk, (i + 1) * chunk) for i in (cp_rank, 2 * self.cp - 1 - cp_rank))


@dataclass(frozen=True, kw_only=True)
class SequenceCut:
    """Who holds which positions of one sequence, from `SequenceSharding.of`.

    Attributes:
        sharding: How the ranks of a lane share sequences.
        parts: Half-open positions of each cp rank, ascending.
        documents: The cut by documents; None for a sequence that is not packed.
    """

    sharding: SequenceSharding
    parts: tuple[tuple[Interval, ...], ...]
    documents: DocumentCut | None = None

    def cp_intervals(self, cp_rank: int) -> tuple[Interval, ...]:
        """Half-open global positions of a cp rank, ascending, which is its local order."""
        return self.parts[cp_rank]

    def intervals(self, shard: int) -> tuple[Interval, ...]:
        """Half-open global positions of a shard, ascending, which is its local order."""
        sharding = self.sharding
        if not sharding.sequence_parallel:
            return self.parts[shard]
        cp_rank, tp_rank = divmod(shard, sharding.tp)
        size = sharding.shard_length
        return cut(self.parts[cp_rank], tp_rank * size, (tp_rank + 1) * size)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut an interval of positions by shard: (shard, start, stop), ascending."""
        first = bisect_right(self._owners, (start, self.sharding.seq_length, 0)) - 1
        for low, high, shard in self._owners[max(first, 0) :]:
            if low >= stop:
                return
            if max(low, start) < min(high, stop):
                yield shard, max(low, start), min(high, stop)

    @cached_property
    def _owners(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, shard) of every interval of every shard, ascending by position."""
        return tuple(
            sorted(
                (start, stop, shard)
                for shard in range(self.sharding.num_shards)
                for start, stop in self.intervals(shard)
            )
        )


@lru_cache(maxsize=1024)
def _cut_sequence(sharding: SequenceSharding, documents: tuple[int, ...]) -> SequenceCut:
    # Every edge of a step's plan asks for the cut of the same few sequences.
    return sharding._cut(documents)


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
