"""A channel whose two ends compare what they expect to be sent, and then a checksum."""

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
    """What one end expects of a message.

    Attributes:
        lane: Number of the lane whose rows are sent.
        keys: Keys of the lane's samples.
        items: (dp rank of the source, rows, sequence, start) of the lane's manifest entries.
        documents: Number of tokens of each document of the lane's packed sequence, by which rows
            are cut; empty without packing.
        rows: Number of rows in the message.
        known: Whether this end knows the lane; one that neither reads it nor runs its items knows
            only that it exchanges no row of it.
    """

    lane: int
    keys: tuple[str, ...]
    items: tuple[tuple[int, int, int, int], ...]
    rows: int
    documents: tuple[int, ...] = ()
    known: bool = True

    def agrees(self, other: "View") -> bool:
        """Whether both expect the same, as far as both know the lane."""
        if self.known and other.known:
            return self == other
        return (self.lane, self.rows) == (other.lane, other.rows)

    def difference(self, other: "View") -> str:
        """The fields in which two views differ, this one's values first."""
        mine, theirs = asdict(self), asdict(other)
        return "; ".join(
            f"{name} {mine[name]} against {theirs[name]}"
            for name in mine
            if mine[name] != theirs[name]
        )


# (microbatch, lane, rows of the message) -> what this rank expects of it.
ViewOf = Callable[[int, int, int], View]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """Which ranks compare announcements, and how.

    Attributes:
        control: Group of the world, gloo, for the announcements.
        tag: First of the channel's two tags; `stride` times the microbatch is added to both.
        stride: Number of tags that the channels of all bridges take for a microbatch.
        receivers: Rank -> lane whose rows it exchanges with this rank, for the ranks that this
            rank announces to; empty where it only receives.
        senders: Rank -> lane, for the ranks that announce to this rank; empty where it only sends.
        describe: Function that returns the role of a rank in words.
    """

    control: dist.ProcessGroup
    tag: int
    stride: int
    receivers: Mapping[int, int]
    senders: Mapping[int, int]
    describe: Callable[[int], str]


class CheckedChannel(Channel):
    """Announces every message on the host before it is sent, and compares checksums afterwards.

    Every rank announces to every rank that it could send to, so that a message that only one end
    expects is found too, before it can block. Slow: for finding faults.

    Args:
        config: Ranks and groups of the announcements; the other arguments are those of `Channel`.
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
        """Start a step with what this rank expects of each message."""
        self._view = view

    def post(
        self, microbatch: int, outgoing: Outgoing | None, incoming: Incoming | None
    ) -> Pending | None:
        """See `Channel.post`. Receives are posted only after both ends agree on the rows."""
        self._announce(microbatch, outgoing)
        if self._config.senders:
            return _CheckedArrival(self, microbatch, outgoing, incoming)
        return super().post(microbatch, outgoing, incoming)

    def drain(self) -> None:
        """Block until all rows and announcements have been sent."""
        super().drain()
        for work, _ in self._announced:
            work.wait()
        self._announced.clear()

    def receive(
        self, microbatch: int, outgoing: Outgoing | None, incoming: Incoming | None
    ) -> Pending | None:
        """Compare announcements, move the rows, and compare checksums.

        Raises:
            RuntimeError: The views of both ends differ, or the received rows are not those sent.
        """
        messages = {m.peer: m for m in incoming.messages} if incoming else {}
        expected = {}
        for sender, lane in self._config.senders.items():
            mine = self._believe(microbatch, lane, messages.get(sender))
            theirs, expected[sender] = self._announcement(microbatch, sender)
            if not mine.agrees(theirs):
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
                    tag=self._config.stride * microbatch + self._config.tag + offset,
                )
                assert work is not None
                self._announced.append((work, parcel))

    def _announcement(self, microbatch: int, sender: int) -> tuple[View, int]:
        """What a sender expects of its message, and the checksum of its rows."""
        tag = self._config.stride * microbatch + self._config.tag
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, sender, group=self._config.control, tag=tag)
        text = torch.zeros(int(size), dtype=torch.uint8)
        dist.recv(text, sender, group=self._config.control, tag=tag + 1)
        fields = json.loads(bytes(text.tolist()))
        checksum = fields.pop("checksum", 0)
        fields["keys"] = tuple(fields["keys"])
        fields["documents"] = tuple(fields["documents"])
        fields["items"] = tuple(tuple(item) for item in fields["items"])
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
    """Rows whose receive is posted when `wait` is called."""

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
    """CRC-32 of the rows of a message, in the order in which they are sent."""
    value = 0
    for start, stop in message.runs:
        part = rows[start:stop].contiguous().cpu().view(torch.uint8)
        value = zlib.crc32(bytes(memoryview(part.numpy())), value)
    return value
