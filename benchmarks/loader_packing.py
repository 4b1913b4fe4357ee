"""How full packed sequences are, and what choosing costs.

The peers are greedy packers that empty their buffer in every round, as stages of energon do: the
*knapsack* of Megatron-LM's multimodal example (into each sequence the longest sample that still
fits, until none does), and *next fit* (samples as they come).
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from benchlib.report import Row, arguments, median_ratio, show, write

from megatron_mimo.data.packing import Round, plan_round

SEQ_LENGTH = 8192
TARGET_FILL = 0.97
# Of a packer: lengths, capacity, and how many samples the last round held back.
Packer = Callable[[Sequence[int], int, int], Round]


def lengths_of(mean: int, random: np.random.Generator) -> Iterator[int]:
    """Endless lengths in tokens: log-normal, and one in fifty nearly as long as a sequence."""
    while True:
        drawn = random.lognormal(np.log(mean) - 0.5, 1.0, 4096)
        long = random.uniform(0.9 * SEQ_LENGTH, SEQ_LENGTH, 4096)
        chosen = np.where(random.random(4096) < 0.02, long, drawn)
        yield from chosen.astype(int).clip(8, SEQ_LENGTH).tolist()


def knapsack(lengths: Sequence[int], capacity: int, _started: int) -> Round:
    """Into each sequence the longest sample that still fits, until none does."""
    left = sorted((length, i) for i, length in enumerate(lengths))
    groups = []
    while left:
        group, room = [], capacity
        while at := bisect_right(left, (room, len(lengths))):
            length, i = left.pop(at - 1)
            group.append(i)
            room -= length
        groups.append(tuple(group))
    return Round(tuple(groups), ())


def next_fit(lengths: Sequence[int], capacity: int, _started: int) -> Round:
    """Samples as they come, into one sequence until it is full."""
    groups: list[list[int]] = [[]]
    room = capacity
    for i, length in enumerate(lengths):
        if length > room:
            groups.append([])
            room = capacity
        groups[-1].append(i)
        room -= length
    return Round(tuple(tuple(group) for group in groups), ())


def run(
    packer: Packer, mean: int, buffer_size: int, num_sequences: int, seed: int
) -> tuple[float, float]:
    """Share of the sequences that is padding, and microseconds of choosing for each sample."""
    source = lengths_of(mean, np.random.default_rng(seed))
    waiting: list[int] = []
    started = sequences = used = samples = 0
    seconds = 0.0
    while sequences < num_sequences:
        while len(waiting) < buffer_size:
            waiting.append(next(source))
        begin = time.perf_counter()
        done = packer(waiting, SEQ_LENGTH, started)
        seconds += time.perf_counter() - begin
        sequences += len(done.leaving)
        samples += sum(map(len, done.leaving))
        used += sum(waiting[i] for group in done.leaving for i in group)
        waiting = [waiting[i] for i in done.held]
        started = len(waiting)
    return 1 - used / (sequences * SEQ_LENGTH), seconds / samples * 1e6


def rows(quick: bool) -> list[Row]:
    """Padding and time of ours and of the peers on the same lengths.

    Args:
        quick: Fewer sequences and buffer sizes.
    """
    found = []
    num_sequences, rounds = (1000, 3) if quick else (10_000, 5)
    for mean in (700, 2500):
        for buffer_size in (128,) if quick else (128, 512, 2048):
            where = f"samples of {mean} on average, buffer {buffer_size}"
            measured = {
                packer: [run(packer, mean, buffer_size, num_sequences, i) for i in range(rounds)]
                for packer in (plan_round, knapsack, next_fit)
            }
            padding = {p: sum(share for share, _ in runs) / rounds for p, runs in measured.items()}
            ours = padding[plan_round]
            limit = 1 - TARGET_FILL
            found += [
                _padding(f"padding, {where}, to the limit", ours, limit, 1.0),
                _padding(f"padding, {where}, to knapsack", ours, padding[knapsack], 0.9),
                _padding(f"padding, {where}, to next fit", ours, padding[next_fit], 0.5),
            ]
            times = ([time for _, time in measured[p]] for p in (plan_round, knapsack))
            mine, theirs = median_ratio(*times)
            found.append(
                Row(
                    case=f"time, {where}, to knapsack",
                    ours=mine,
                    peer=theirs,
                    target=None,
                    unit="us/sample",
                )
            )
    return found


def _padding(case: str, ours: float, peer: float, target: float) -> Row:
    return Row(case=case, ours=ours, peer=peer, target=target, unit="share of padding")


def main() -> None:
    """Print and write the rows."""
    args = arguments(__doc__ or "")
    found = rows(args.quick)
    show("packing", found)
    write(found, args.json)


if __name__ == "__main__":
    main()
