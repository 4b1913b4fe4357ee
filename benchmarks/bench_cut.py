"""Packed sequences over context-parallel ranks: ours against other ways to cut them.

Sequences of 8192 tokens are packed as in training from log-normal lengths of 700 tokens on average,
one in fifty nearly as long as the sequence, through a buffer of 512 samples. The peers are

- *whole chunks*: 2 x cp chunks of the sequence, of which each rank takes one from either end, as
  where sequences are not packed;
- *each document*: 2 x cp chunks of each document, as Transformer Engine takes them, for which
  every document is padded to a multiple of 2 x cp;
- *whole documents*: the longest first, each to the rank with the least attention so far; ranks then
  have different numbers of tokens, and wait for the fullest.

Attention counts pairs of a causal mask. A rank's keys and values are *gathered* where other ranks
need them. Planning is one call without the cache, in processor time.

    python benchmarks/bench_cut.py [--smoke | --quick] [--json FILE]
"""

import heapq
import time
from collections.abc import Iterator, Sequence

import numpy as np
from benchlib.report import Row, Size, run_benchmark
from loader_packing import SEQ_LENGTH, lengths_of

from megatron_mimo.data.loader.packing import plan_round
from megatron_mimo.kernels.cut import DocumentCut, cut_documents

RANKS = (2, 4, 8)
BUFFER = 512
# Sequences and seeds.
CASES: dict[Size, tuple[int, int]] = {"smoke": (20, 1), "quick": (100, 3), "full": (1000, 3)}
BUSIEST_TARGET, PLAN_TARGET_MS = 1.05, 1.0


def sequences(number: int, seed: int) -> list[tuple[int, ...]]:
    """Lengths of the documents of packed sequences, and of the padding after them."""
    source = lengths_of(700, np.random.default_rng(seed))
    waiting: list[int] = []
    found: list[tuple[int, ...]] = []
    started = 0
    while len(found) < number:
        while len(waiting) < BUFFER:
            waiting.append(next(source))
        done = plan_round(waiting, SEQ_LENGTH, started)
        for group in done.leaving:
            lengths = [waiting[i] for i in group]
            rest = SEQ_LENGTH - sum(lengths)
            found.append((*lengths, rest) if rest else tuple(lengths))
        waiting = [waiting[i] for i in done.held]
        started = len(waiting)
    return found[:number]


def whole_chunks(lengths: Sequence[int], ranks: int) -> list[int]:
    """Attention of each rank that has a chunk from either end of the sequence."""
    before = np.concatenate([np.arange(1, length + 1) for length in lengths])
    chunks = before.reshape(2 * ranks, -1).sum(1)
    return [int(chunks[rank] + chunks[-1 - rank]) for rank in range(ranks)]


def whole_documents(lengths: Sequence[int], ranks: int) -> tuple[list[int], list[int]]:
    """Attention and tokens of each rank that has whole documents."""
    loads = [(0, rank) for rank in range(ranks)]
    tokens = [0] * ranks
    for length in sorted(lengths, reverse=True):
        load, rank = heapq.heappop(loads)
        tokens[rank] += length
        heapq.heappush(loads, (load + length * (length + 1) // 2, rank))
    return [load for load, _ in loads], tokens


def busiest(loads: Sequence[int]) -> float:
    """What the busiest rank has, by the mean."""
    return max(loads) * len(loads) / sum(loads)


def planned(lengths: tuple[int, ...], ranks: int) -> tuple[DocumentCut, float]:
    """The cut, and milliseconds of processor time that it took."""
    begin = time.process_time()
    cut = cut_documents.__wrapped__(lengths, ranks)
    return cut, 1000 * (time.process_time() - begin)


def measure(size: Size) -> Iterator[Row]:
    """Rows of every number of ranks; a pair for each seed."""
    number, seeds = CASES[size]
    drawn = [sequences(number, seed) for seed in range(seeds)]
    for ranks in RANKS:
        cuts = [[planned(lengths, ranks) for lengths in of_seed] for of_seed in drawn]
        ours = tuple(max(busiest(cut.work) for cut, _ in found) for found in cuts)
        mean = tuple(float(np.mean([busiest(cut.work) for cut, _ in found])) for found in cuts)

        def row(
            column: str,
            mine: Sequence[float],
            peer: Sequence[float],
            *,
            unit: str,
            target: float | None = None,
            line: str = f"{ranks} ranks",
        ) -> Row:
            return Row(
                line=line,
                column=column,
                ours=tuple(mine),
                peer=tuple(peer),
                target=target,
                unit=unit,
            )

        yield row(
            "busiest rank of the worst sequence by the limit",
            ours,
            (BUSIEST_TARGET,) * seeds,
            target=1.0,
            unit="of the mean",
        )
        chunks, documents, tokens = [], [], []
        for of_seed in drawn:
            chunks.append(float(np.mean([busiest(whole_chunks(one, ranks)) for one in of_seed])))
            alone = [whole_documents(one, ranks) for one in of_seed]
            documents.append(float(np.mean([busiest(loads) for loads, _ in alone])))
            tokens.append(float(np.mean([busiest(held) for _, held in alone])))
        yield row("busiest rank by whole chunks", mean, chunks, unit="of the mean")
        yield row("busiest rank by whole documents", mean, documents, unit="of the mean")
        yield row("tokens by whole documents", (1.0,) * seeds, tokens, unit="of the mean")
        split = [
            [sum(cut.lengths[i] for i in cut.split) / SEQ_LENGTH for cut, _ in found]
            for found in cuts
        ]
        yield row(
            "gathered by each document",
            [float(np.mean(shares)) for shares in split],
            (1.0,) * seeds,
            unit="share of the positions",
        )
        yield row(
            "pieces of a rank by each document",
            [
                float(np.mean([len(one) for cut, _ in found for one in cut.pieces]))
                for found in cuts
            ],
            [float(np.mean([2 * len(lengths) for lengths in of_seed])) for of_seed in drawn],
            unit="pieces",
        )
        yield row(
            "planning by the limit",
            [float(np.mean([spent for _, spent in found])) for found in cuts],
            (PLAN_TARGET_MS,) * seeds,
            target=1.0,
            unit="ms/sequence",
        )


if __name__ == "__main__":
    run_benchmark(__doc__, measure, threads=1)
