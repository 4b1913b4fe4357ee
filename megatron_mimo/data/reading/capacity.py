"""Whether a dataset has samples for all workers, and a machine memory for their buffers."""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_mimo.data.source import SourceConfig

_GIB = 2**30
# Buffers of fewer samples fit anywhere, and need no look at each shard.
_FEW = 1000


def check_capacity(
    config: SourceConfig, num_samples: Sequence[int], num_lanes: int, lanes_here: int
) -> None:
    """Refuse more lanes or workers than samples, and buffers that cannot be held in memory.

    A worker without a sample reads nothing, and a buffer beyond the memory fills for an hour before
    the machine ends the run.

    Args:
        config: Source of the samples, energon.
        num_samples: Number of samples of each dataset of a blend.
        num_lanes: Number of lanes of the job.
        lanes_here: Number of lanes that this rank reads.

    Raises:
        ValueError: There are too many lanes or workers, or the buffers are too large; the message
            has the figures and what to set.
    """
    samples, per_lane = sum(num_samples), max(1, config.num_workers)
    workers = per_lane * num_lanes
    if 0 < samples < num_lanes:
        raise ValueError(
            f"--llm-dp {num_lanes} is {num_lanes:,} lanes, and the train split of --data-path "
            f"{config.path} has {samples:,} samples: expected at least a sample for each; set "
            f"--llm-dp {samples} or fewer, or add samples"
        )
    if per_lane > 1 and workers > samples:
        fitting = samples // num_lanes
        raise ValueError(
            f"--num-workers {config.num_workers} x --llm-dp {num_lanes} is {workers:,} workers, "
            f"and the train split of --data-path {config.path} has {samples:,} samples: expected "
            f"at least a sample for each; set --num-workers {fitting} or fewer"
        )
    held = {
        "--shuffle-buffer-size": config.shuffle_buffer_size,
        "--packing-buffer-size": config.packing_buffer_size or 0,
    }
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    flag = max(held, key=lambda name: held[name])
    # A buffer never holds more than the samples that its worker reads.
    number = sum(min(most, -(-samples // workers)) for most in held.values())
    number_here = number * per_lane * lanes_here
    if number_here < _FEW:
        return
    size = _stored_bytes(Path(config.path or "")) / max(1, samples)
    needed = number_here * size
    if needed > memory:
        fitting = int(memory / (size * per_lane * lanes_here)) // 2
        raise ValueError(
            f"{flag} {held[flag]:,}: buffers of {number:,} samples of {size / 2**20:.2f} MiB in "
            f"{per_lane * lanes_here} workers of a rank need {needed / _GIB:.1f} GiB, and this "
            f"machine has {memory / _GIB:.1f} GiB; set {flag} {fitting:,} or less"
        )


def _stored_bytes(path: Path) -> int:
    """Size of the shards of a dataset's folder; 0 for other sources, whose media lie anywhere."""
    if not path.is_dir():
        return 0
    return sum(file.stat().st_size for file in path.rglob("*.tar") if file.is_file())
