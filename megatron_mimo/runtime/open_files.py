"""Open files of a rank: its limit, how many it needs, and fewer of them.

Each process group of the hosts has a port and pipes of its own, and a socket for each peer that it
talks to. gloo connects all pairs of a group when it is made, unless it is told to wait until two
ranks have something to say: then a ring has two sockets on each rank, however many ranks it has.
"""

import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

# Nothing of ours needs more, and some programs walk through all that are allowed.
_ENOUGH = 1 << 20
_LAZY = "TORCH_GLOO_LAZY_INIT"

# Measured by tests/sockets.py, rounded up.
_RANK = 80
"""Files of a rank without any group: the interpreter, the reader's pipes, logs, the store."""
_GROUP = 6
"""Files of a group without any socket."""
_COMMUNICATOR = 24
"""Files of a communicator of NCCL: an allowance, not measured, for the sockets by which its ranks
find each other and those of a machine serve each other. What a network's plugin opens for
connections between machines is not among them."""
_READER = 12
"""Files of a rank for each process that reads for it: pipes, and shards that are open."""
_HUB = 150
"""Files of the hub of fail-fast beside the connections of the watchers."""


def raise_limit() -> int:
    """Raise the limit of open files as far as this user may.

    Returns:
        The limit that now holds.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _ENOUGH if soft == resource.RLIM_INFINITY else soft
    with suppress(OSError, ValueError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft


def connect_lazily() -> None:
    """Have gloo connect two ranks when they first talk; to be called before a group is made."""
    os.environ.setdefault(_LAZY, "1")


@contextmanager
def connected_at_once() -> Iterator[None]:
    """Have gloo connect all pairs of the groups that are made inside.

    Two ranks that connect lazily wait for each other: a receive that is posted ahead would wait
    until its sender comes to that message, and a schedule that relies on posting could not go on.
    """
    before = os.environ.get(_LAZY)
    os.environ[_LAZY] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LAZY]
        else:
            os.environ[_LAZY] = before


def needed(
    group_sizes: Iterable[int],
    *,
    serves: int = 0,
    readers: int = 0,
    meshes: Iterable[int] = (),
    communicators: int = 0,
    lazily: bool | None = None,
) -> int:
    """Upper bound of the open files of a rank.

    Args:
        group_sizes: Number of ranks of each group of gloo that the rank is in.
        serves: Number of ranks that connect to the store and to the hub of this rank; on rank 0
            all of them.
        readers: Number of processes that read for the rank.
        meshes: Number of ranks of each group of gloo whose pairs are all connected at once.
        communicators: Number of groups of NCCL that the rank is in.
        lazily: Whether gloo connects lazily; None for what this version of torch can do and the
            environment asks for.
    """
    if lazily is None:
        lazily = _can_be_lazy() and os.environ.get(_LAZY, "1") not in ("", "0", "N", "n")
    groups = sum(_GROUP + (_lazy_peers(size) if lazily else size - 1) for size in group_sizes)
    groups += sum(_GROUP + size - 1 for size in meshes)
    rank = _RANK + groups + _COMMUNICATOR * communicators + _READER * readers
    # The hub is a process of its own, with the same limit.
    return serves + max(rank, _HUB if serves else 0)


def check_limit(limit: int, needs: int, what: str) -> None:
    """Refuse to start where files would run out later.

    Args:
        limit: Limit that holds, from `raise_limit`.
        needs: Number that is needed.
        what: What needs them, such as `rank 0 (llm dp 0) of 800`.

    Raises:
        ValueError: The limit is too low; the message has both numbers and the remedy.
    """
    if limit < needs:
        raise ValueError(
            f"{what} needs up to {needs} open files and sockets, but this user may open {limit}: "
            f"raise the hard limit where the ranks start, with `ulimit -Hn {needs}` as root or in "
            f"/etc/security/limits.conf (nofile); under Slurm see also PropagateResourceLimits"
        )


def _lazy_peers(size: int) -> int:
    """Most peers of a rank: a ring, trees and a barrier of the group; messages go to few."""
    return min(size - 1, 2 + 2 * (size - 1).bit_length())


def _can_be_lazy() -> bool:
    gloo = getattr(dist, "ProcessGroupGloo", None)
    return "lazy_init" in (getattr(gloo, "create_default_device", None).__doc__ or "")
