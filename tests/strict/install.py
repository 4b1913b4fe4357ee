"""The strict group as a backend of torch, on ranks of a test."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_mimo.runtime import Device
from tests.strict.group import StrictGroup
from tests.strict.host_made import factories_watched
from tests.strict.line import lines

STRICT = "strict"
LIMIT = timedelta(seconds=25)
"""Longer than any operation takes on a busy machine; a deadlock takes so long to be told. Shorter
than gloo's limit in the groups of the hosts, and than a test's, so that it is told by name."""


@dataclass(frozen=True, slots=True)
class StrictDevice(Device):
    """A host whose device tensors travel in strict groups."""

    @property
    def backend(self) -> str:
        """See `Device.backend`."""
        return STRICT


def _make(store: dist.Store, rank: int, size: int, timeout: timedelta) -> StrictGroup:
    return StrictGroup(store, rank, size, min(timeout, LIMIT))


@contextmanager
def strict_groups() -> Iterator[None]:
    """Let `dist.new_group(backend="strict")` make strict groups, in this process."""
    if STRICT.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(STRICT, _make, devices=["cpu"])
    plain = dist.batch_isend_irecv

    def batched(operations: list[dist.P2POp]) -> list[Any]:
        group = operations[0].group
        return [group.batch(operations)] if isinstance(group, StrictGroup) else plain(operations)

    # torch batches for its own class of groups alone, not for one that is derived from it.
    dist.batch_isend_irecv = batched
    try:
        with factories_watched():
            yield
    finally:
        dist.batch_isend_irecv = plain
        for line in lines:
            line.close()
        lines.clear()
