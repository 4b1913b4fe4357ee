"""How full packed sequences are, and what choosing costs.

The peers are greedy packers that empty their buffer in every round, as stages of energon do: the
*knapsack* of Megatron-LM's multimodal example (into each sequence the longest sample that still
fits, until none does), and *next fit* (samples as they come).
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from benchlib.report import Row, Size

from megatron_mimo.data.loader.packing import Round, plan_round

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


# Sequences, seeds, and sizes of the buffer.
_CASES: dict[Size, tuple[int, int, tuple[int, ...]]] = {
    "smoke": (100, 1, (128,)),
    "quick": (1000, 3, (128,)),
    "full": (10_000, 5, (128, 512, 2048)),
}


def rows(size: Size) -> Iterator[Row]:
    """Padding and time of ours and of the peers on the same lengths; a pair for each seed.

    Args:
        size: Number of sequences, seeds and buffer sizes.
    """
    num_sequences, seeds, buffers = _CASES[size]
    for mean in (700, 2500):
        for buffer_size in buffers:
            runs = {
                packer: [run(packer, mean, buffer_size, num_sequences, i) for i in range(seeds)]
                for packer in (plan_round, knapsack, next_fit)
            }
            padding = {packer: tuple(share for share, _ in found) for packer, found in runs.items()}
            times = {packer: tuple(time for _, time in found) for packer, found in runs.items()}
            line = f"{mean} tokens a sample, buffer {buffer_size}"
            for column, peer, target in (
                ("padding by the limit", (1 - TARGET_FILL,) * seeds, 1.0),
                ("padding by knapsack's", padding[knapsack], 0.9),
                ("padding by next fit's", padding[next_fit], 0.5),
            ):
                yield Row(
                    table="Packing",
                    line=line,
                    column=column,
                    ours=padding[plan_round],
                    peer=peer,
                    target=target,
                    unit="share of padding",
                )
            yield Row(
                table="Packing",
                line=line,
                column="time by knapsack's",
                ours=times[plan_round],
                peer=times[knapsack],
                unit="us/sample",
            )
