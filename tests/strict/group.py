"""The strict group: gloo moves the data, and the rules are NCCL's."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.strict import host_made
from tests.strict.collectives import COLLECTIVES, OLD_NAMES, tensors_of
from tests.strict.errors import StrictError
from tests.strict.line import Line, StrictWork, lines
from tests.strict.notes import Note, Notes

_HOST = torch.device("cpu")
# Tags below gloo: of what is said about messages, and the first of the messages themselves.
_TALK, _FIRST = 1, 16
_OFFERED, _TAKEN = 0, 1
_DTYPES = [
    getattr(torch, name)
    for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a batch.

    Attributes:
        sends: Whether this rank sends it.
        tensor: What is sent, or where it arrives.
        peer: The other rank, in the group.
        tag: Tag that the program gives it, which NCCL does not see.
    """

    sends: bool
    tensor: Tensor
    peer: int
    tag: int

    def __str__(self) -> str:
        """In words, for errors."""
        what = f"{self.tensor.numel()} {str(self.tensor.dtype).removeprefix('torch.')}"
        return f"{'send' if self.sends else 'receive'} of {what} " + (
            f"to {self.peer}" if self.sends else f"from {self.peer}"
        )


class StrictGroup(dist.ProcessGroup):
    """A group whose operations run as those of an NCCL group do; see the package for the rules.

    Nothing is connected before the first operation, which all ranks take part in.

    Args:
        store: Store of the group.
        rank: Rank in the group.
        size: Number of ranks.
        timeout: Longest time that an operation may take; a program that would hang under NCCL ends
            with an error after it.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._own_store = store
        self._limit = timeout
        self._line_of: Line | None = None
        self._begun = False
        self._gloo: Any = None
        self._notes: Notes | None = None
        self._collectives = 0
        # Messages to each peer and from each peer so far, and what peers have offered early.
        self._sent: Counter[int] = Counter()
        self._offers: defaultdict[int, deque[list[int]]] = defaultdict(deque)

    @property
    def _device_types(self) -> list[torch.device]:
        """Asked for by collectives of objects alone, which stage them in tensors of the hosts."""
        raise StrictError(
            f"group {self.group_desc!r} is for tensors of the device: send objects in a group of "
            f"the hosts"
        )

    def batch(self, operations: Sequence[dist.P2POp]) -> StrictWork:
        """Post a batch of messages as one operation."""
        return self._post(
            [
                Message(one.op in (dist.isend, dist.send), one.tensor, one.group_peer, one.tag)
                for one in operations
            ],
            wait=False,
        )

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> StrictWork:
        """Post a message by itself."""
        return self._post([Message(True, tensors[0], peer, tag)], wait=False)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> StrictWork:
        """Post the receive of a message by itself."""
        return self._post([Message(False, tensors[0], peer, tag)], wait=False)

    def recv_anysource(self, _tensors: list[Tensor], _tag: int = 0) -> StrictWork:
        """Not to be had."""
        raise StrictError("NCCL cannot receive from any rank: name the one that sends")

    def _line(self) -> Line:
        if self._line_of is None:
            self._line_of = Line(self.group_desc, self._limit.total_seconds())
            lines.append(self._line_of)
        return self._line_of

    def _post(self, messages: list[Message], *, wait: bool) -> StrictWork:
        text = ", ".join(map(str, messages))
        if not self._begun:
            raise StrictError(
                f"group {self.group_desc!r} begins with messages ({text}): the first operation of "
                f"a group makes NCCL's communicator, and all of its ranks must take part in it; "
                f"let them reduce a tensor of the device first"
            )
        for message in messages:
            self._refuse_host(message.tensor, str(message))
            if message.peer == self.rank():
                raise StrictError(f"group {self.group_desc!r}: {message}, which is this rank")
        return self._line().put(
            f"[{text}]" if len(messages) > 1 else text,
            lambda: self._exchange(messages),
            wait=wait,
        )

    def _collect(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StrictWork:
        """Post a collective."""
        note = COLLECTIVES[OLD_NAMES.get(name, name)](self.rank(), self.size(), *args, **kwargs)
        if note.text == "barrier" and not self._begun:
            raise StrictError(
                f"group {self.group_desc!r} begins with a barrier: where a group has gloo too, it "
                f"runs on the hosts and leaves NCCL without a communicator; let all ranks reduce a "
                f"tensor of the device first"
            )
        for tensor in tensors_of(args):
            self._refuse_host(tensor, note.text)
        self._begun = True
        opts = kwargs.get("opts", args[-1] if args else None)
        return self._line().put(
            note.text,
            lambda: self._run_collective(name, args, kwargs, note),
            wait=not getattr(opts, "asyncOp", True),
        )

    def _refuse_host(self, tensor: Tensor, text: str) -> None:
        if (why := host_made.reason(tensor)) is not None:
            raise StrictError(
                f"group {self.group_desc!r}: {text}, of a tensor that {why}, so it is one of the "
                f"hosts: send it in a group of the hosts"
            )

    def _start(self) -> None:
        """Connect all ranks, as NCCL does in the first operation."""
        rank, size = self.rank(), self.size()
        self._notes = Notes(self._own_store, rank, size, self._limit)
        kind = dist.ProcessGroup.BackendType.GLOO
        gloo = dist.ProcessGroup(self._own_store, rank, size)
        gloo._set_default_backend(kind)
        gloo._register_backend(
            _HOST, kind, dist.ProcessGroupGloo(self._own_store, rank, size, self._limit)
        )
        gloo.barrier().wait()
        self._notes.all_have_it()
        self._gloo = gloo

    def _run_collective(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], note: Note
    ) -> None:
        if self._gloo is None:
            self._start()
        assert self._notes is not None
        self._collectives += 1
        self._notes.write(self._collectives, note)
        for rank, other in self._notes.others(self._collectives):
            if (difference := note.difference(other, self.rank(), rank)) is not None:
                raise StrictError(
                    f"group {self.group_desc!r}, collective {self._collectives}: rank "
                    f"{self.rank()} and rank {rank} differ: {difference}; NCCL would hang, or mix "
                    f"up memory"
                )
        work = getattr(self._gloo, name)(*args, **kwargs)
        if work is not None:
            work.wait()

    def _exchange(self, messages: list[Message]) -> None:
        """Move the messages of a batch, in any order, until all of them have arrived."""
        works: list[Any] = []
        going: set[tuple[int, int]] = set()
        coming: defaultdict[int, deque[Message]] = defaultdict(deque)
        for message in messages:
            if not message.sends:
                coming[message.peer].append(message)
                continue
            number = self._sent[message.peer]
            self._sent[message.peer] += 1
            size, dtype = message.tensor.numel(), _DTYPES.index(message.tensor.dtype)
            works.append(self._say(message.peer, _OFFERED, number, size, dtype, message.tag))
            if size:
                works.append(self._gloo.send([message.tensor], message.peer, _FIRST + number))
            going.add((message.peer, number))
        while True:
            for peer, wanted in coming.items():
                while wanted and self._offers[peer]:
                    works += self._take(wanted.popleft(), self._offers[peer].popleft())
            if not going and not any(coming.values()):
                break
            kind, peer, *offer = self._hear()
            if kind == _TAKEN:
                going.discard((peer, offer[0]))
            else:
                self._offers[peer].append(offer)
        for work in works:
            work.wait()

    def _take(self, message: Message, offer: list[int]) -> list[Any]:
        number, size, dtype, tag = offer
        sent = f"{size} {str(_DTYPES[dtype]).removeprefix('torch.')}"
        if (size, _DTYPES[dtype]) != (message.tensor.numel(), message.tensor.dtype):
            raise StrictError(
                f"group {self.group_desc!r}: {message} on rank {self.rank()}, but rank "
                f"{message.peer} sends {sent}; NCCL would hang, or mix up memory"
            )
        if tag != message.tag:
            raise StrictError(
                f"group {self.group_desc!r}: {message} with tag {message.tag} on rank "
                f"{self.rank()} meets what rank {message.peer} sends with tag {tag}: NCCL has no "
                f"tags, and the first that was sent is the first that is received"
            )
        if size:
            self._gloo.recv([message.tensor], message.peer, _FIRST + number).wait()
        return [self._say(message.peer, _TAKEN, number, 0, 0, 0)]

    def _say(self, peer: int, *numbers: int) -> Any:
        return self._gloo.send([torch.tensor(numbers, device=_HOST)], peer, _TALK)

    def _hear(self) -> list[int]:
        """What a peer says next: kind, peer, then what it said of a message."""
        heard = torch.zeros(5, dtype=torch.int64, device=_HOST)
        work = self._gloo.recv_anysource([heard], _TALK)
        work.wait()
        kind, *rest = heard.tolist()
        return [kind, work._source_rank(), *rest]


def _collective(name: str) -> Callable[..., StrictWork]:
    def method(self: StrictGroup, *args: Any, **kwargs: Any) -> StrictWork:
        return self._collect(name, args, kwargs)

    return method


for _name in (*COLLECTIVES, *OLD_NAMES):
    setattr(StrictGroup, _name, _collective(_name))
