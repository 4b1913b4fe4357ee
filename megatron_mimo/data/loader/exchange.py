"""Bytes between ranks that read, in groups that nothing else uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.data.loader.component import Component
from megatron_mimo.runtime.open_files import connected_at_once
from megatron_mimo.topology.group_plan import HOST_BACKEND


@dataclass(frozen=True, slots=True)
class Exchange:
    """Groups of a component, as one of its ranks that read sees them.

    Attributes:
        ranks: Global ranks that read, ascending.
        rank: Global rank of this process, one of them.
        everyone: Group of these ranks, gloo; None for a single one.
        movers: Group of the ranks between which content moves, gloo; None where this rank is not
            one of several.
    """

    ranks: tuple[int, ...]
    rank: int
    everyone: dist.ProcessGroup | None = None
    movers: dist.ProcessGroup | None = None

    def tell(self, message: Tensor) -> dict[int, Tensor]:
        """Give every rank a message, and get those of all. Collective over the ranks.

        Args:
            message: Bytes of this rank's, uint8 [n].

        Returns:
            Rank -> its message.
        """
        if self.everyone is None:
            return {self.rank: message}
        lengths = [torch.empty(1, dtype=torch.int64) for _ in self.ranks]
        dist.all_gather(lengths, torch.tensor([len(message)]), group=self.everyone)
        sizes = [int(length) for length in lengths]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(message)] = message
        found = [torch.empty_like(padded) for _ in self.ranks]
        dist.all_gather(found, padded, group=self.everyone)
        return {
            rank: each[:size] for rank, each, size in zip(self.ranks, found, sizes, strict=True)
        }

    def move(self, sends: Mapping[int, Tensor], receives: Mapping[int, int]) -> dict[int, Tensor]:
        """Send messages whose sizes the receivers know.

        Args:
            sends: Receiver -> bytes, uint8 [n].
            receives: Sender -> number of bytes of its message.

        Returns:
            Sender -> its message, uint8 [n].
        """
        found = {sender: torch.empty(size, dtype=torch.uint8) for sender, size in receives.items()}
        # Receives first: none of them then waits for a send of this rank.
        work = [dist.irecv(buffer, src, group=self.movers) for src, buffer in found.items()]
        work += [dist.isend(message, dst, group=self.movers) for dst, message in sends.items()]
        for each in work:
            assert each is not None
            each.wait()
        return found


def build_exchange(components: Sequence[Component], rank: int) -> Exchange | None:
    """Create the groups of every component. Collective over the world, with equal components.

    Returns:
        The exchange of this rank; None where it does not read.
    """
    mine: Exchange | None = None
    for component in components:
        readers, movers = component.readers, component.movers
        everyone = _group(readers, "dispatch")
        with connected_at_once():
            between = _group(movers, "items")
        if rank in readers:
            mine = Exchange(readers, rank, everyone, between if rank in movers else None)
    return mine


def _group(ranks: Sequence[int], name: str) -> dist.ProcessGroup | None:
    if len(ranks) < 2:
        return None
    group: dist.ProcessGroup = dist.new_group(list(ranks), backend=HOST_BACKEND, group_desc=name)
    return group
