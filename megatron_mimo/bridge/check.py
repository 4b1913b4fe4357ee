"""A channel that distrusts itself: both ends compare what they think travels, then a checksum."""

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.bridge.plan import Message
from megatron_mimo.bridge.transport import Channel, Incoming, Outgoing, Pending


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What one end believes of a message.

    Attributes:
        lane: The lane whose rows travel.
        keys: Keys of the lane's samples.
        images: (encoder dp rank, rows, sequence, start) of the lane's manifest entries.
        rows: Rows in the message.
    """

    lane: int
    keys: tuple[str, ...]
    images: tuple[tuple[int, int, int, int], ...]
    rows: int

    def difference(self, other: "View") -> str:
        """The fields in which two views differ, this one's values first."""
        mine, theirs = asdict(self), asdict(other)
        return "; ".join(
            f"{name} {mine[name]} against {theirs[name]}"
            for name in mine
            if mine[name] != theirs[name]
        )


# (microbatch, lane, rows of the message) to what this rank believes of it.
ViewOf = Callable[[int, int, int], View]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """Who compares what with whom.

    Attributes:
        control: gloo group of the world, for the announcements.
        tag: 0 or 2; with four times the microbatch, it and the next number tag announcements.
        receivers: Rank -> lane whose rows it exchanges with this one, of the ranks that this one
            announces to; empty where it only receives.
        senders: The same for ranks that announce to this one; empty where it only sends.
        describe: Names a rank by its role.
    """

    control: dist.ProcessGroup
    tag: int
    receivers: Mapping[int, int]
    senders: Mapping[int, int]
    describe: Callable[[int], str]


class CheckedChannel(Channel):
    """Announces every message on the host before it travels, and compares checksums after.

    Every rank announces to every rank that it could send to, so that a message that only one end
    knows of is found too, before it can hang. Slow: for finding faults.

    Args:
        config: Who compares with whom; the other arguments are `Channel`'s.
    """

    def __init__(
        self,
        name: str,
        group: dist.ProcessGroup,
        *,
        config: CheckConfig,
        rank: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(name, group, rank=rank, width=width, dtype=dtype, device=device)
        self._config = config
        self._view: ViewOf | None = None
        self._announced: list[tuple[dist.Work, Tensor]] = []

    def begin(self, view: ViewOf) -> None:
        """Start a step with what this rank believes of each message."""
        self._view = view

    def post(
        self, microbatch: int, outgoing: Outgoing | None, incoming: Incoming | None
    ) -> Pending | None:
        """See `Channel.post`. Rows that arrive are asked for only once both ends agree on them."""
        self._announce(microbatch, outgoing)
        if self._config.senders:
            return _CheckedArrival(self, microbatch, outgoing, incoming)
        return super().post(microbatch, outgoing, incoming)

    def drain(self) -> None:
        """Block until all rows and announcements have left."""
        super().drain()
        for work, _ in self._announced:
            work.wait()
        self._announced.clear()

    def receive(
        self, microbatch: int, outgoing: Outgoing | None, incoming: Incoming | None
    ) -> Pending | None:
        """Compare announcements, move the rows, and compare checksums.

        Raises:
            RuntimeError: Both ends' views differ, or the rows that arrived are not those sent.
        """
        messages = {m.peer: m for m in incoming.messages} if incoming else {}
        expected = {}
        for sender, lane in self._config.senders.items():
            mine = self._believe(microbatch, lane, messages.get(sender))
            theirs, expected[sender] = self._announcement(microbatch, sender)
            if mine != theirs:
                raise RuntimeError(
                    f"{self._where(microbatch, sender)}: both ends disagree, receiver against "
                    f"sender: {mine.difference(theirs)}"
                )
        arrival = super().post(microbatch, outgoing, incoming)
        rows = arrival.wait() if arrival is not None else None
        for sender, message in messages.items():
            if sender == self.rank or rows is None:
                continue
            if _checksum(rows, message) != expected[sender]:
                raise RuntimeError(
                    f"{self._where(microbatch, sender)}: {message.rows} rows arrived with another "
                    f"checksum than they were sent with: their memory was changed before they had "
                    f"left, or while they arrived"
                )
        return arrival

    def _announce(self, microbatch: int, outgoing: Outgoing | None) -> None:
        messages = {m.peer: m for m in outgoing.messages} if outgoing else {}
        for receiver, lane in self._config.receivers.items():
            message = messages.get(receiver)
            view = asdict(self._believe(microbatch, lane, message))
            if outgoing is not None and message is not None:
                view["checksum"] = _checksum(outgoing.rows, message)
            text = torch.frombuffer(bytearray(json.dumps(view).encode()), dtype=torch.uint8)
            for offset, parcel in enumerate((torch.tensor([text.numel()]), text)):
                work = dist.isend(
                    parcel,
                    receiver,
                    group=self._config.control,
                    tag=4 * microbatch + self._config.tag + offset,
                )
                assert work is not None
                self._announced.append((work, parcel))

    def _announcement(self, microbatch: int, sender: int) -> tuple[View, int]:
        """What a sender believes of its message, and the checksum of its rows."""
        tag = 4 * microbatch + self._config.tag
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, sender, group=self._config.control, tag=tag)
        text = torch.zeros(int(size), dtype=torch.uint8)
        dist.recv(text, sender, group=self._config.control, tag=tag + 1)
        fields = json.loads(bytes(text.tolist()))
        checksum = fields.pop("checksum", 0)
        fields["keys"] = tuple(fields["keys"])
        fields["images"] = tuple(tuple(image) for image in fields["images"])
        return View(**fields), checksum

    def _believe(self, microbatch: int, lane: int, message: Message | None) -> View:
        assert self._view is not None, "begin() starts a step"
        return self._view(microbatch, lane, 0 if message is None else message.rows)

    def _where(self, microbatch: int, sender: int) -> str:
        describe = self._config.describe
        return (
            f"bridge check, {self.name} of microbatch {microbatch} from rank {sender} "
            f"({describe(sender)}) to rank {self.rank} ({describe(self.rank)})"
        )


class _CheckedArrival:
    """Rows that are asked for when they are waited for."""

    def __init__(
        self,
        channel: CheckedChannel,
        microbatch: int,
        outgoing: Outgoing | None,
        incoming: Incoming | None,
    ) -> None:
        self._receive = partial(channel.receive, microbatch, outgoing, incoming)
        self._arrival: Pending | None = None

    def wait(self) -> Tensor | None:
        """See `Pending.wait`."""
        self._arrival = self._receive()
        return None if self._arrival is None else self._arrival.wait()

    def release(self) -> None:
        """See `Pending.release`."""
        if self._arrival is not None:
            self._arrival.release()


def _checksum(rows: Tensor, message: Message) -> int:
    """CRC-32 of the rows of a message, in the order in which they travel."""
    value = 0
    for start, stop in message.runs:
        part = rows[start:stop].contiguous().cpu().view(torch.uint8)
        value = zlib.crc32(bytes(memoryview(part.numpy())), value)
    return value
