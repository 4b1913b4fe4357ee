"""What crosses between two stages in a step, as one rank sees it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_mimo.bridge.plan import Message, ModulePlan
from megatron_mimo.bridge.transport import Channel, Incoming, Outgoing, Pending


@dataclass(frozen=True, kw_only=True, slots=True)
class Channels:
    """Both directions over one boundary; they outlive a step and keep their buffers."""

    forward: Channel
    backward: Channel


class Boundary:
    """One boundary in one step.

    Args:
        channels: Both directions.
        source: Plan of each microbatch for the side that produces rows, None for one that this rank
            produces nothing in; None where this rank does not hold that side.
        target: The same for the side that uses them.
        returns: Of each microbatch, whether gradients go back.
    """

    def __init__(
        self,
        channels: Channels,
        *,
        source: Sequence[ModulePlan | None] | None,
        target: Sequence[ModulePlan | None] | None,
        returns: Sequence[bool],
    ) -> None:
        self.returns = returns
        self._channels = channels
        self._source = source
        self._target = target
        self._rows: dict[int, Pending] = {}
        self._gradients: dict[int, Pending] = {}

    def post_forward(self, m: int, rows: Tensor | None) -> None:
        """Post the rows of a microbatch: those that leave, if given, and those that arrive."""
        arrival = self._channels.forward.post(
            m,
            None if rows is None else _outgoing(self._source, m, rows),
            _incoming(self._target, m),
        )
        if arrival is not None:
            self._rows[m] = arrival

    def post_backward(self, m: int, gradients: Tensor | None) -> None:
        """Post the gradients of a microbatch: those that leave, if given, and those that arrive."""
        if gradients is not None:
            # Whoever receives gradients posted that before they could be computed, so the earlier
            # ones are gone or about to be; this frees them where a backend cannot be polled.
            self._channels.backward.drain()
        arrival = self._channels.backward.post(
            m,
            None if gradients is None else _outgoing(self._target, m, gradients),
            _incoming(self._source, m),
        )
        if arrival is not None:
            self._gradients[m] = arrival

    def wait_forward(self, m: int) -> Tensor | None:
        """The rows [R, width] that arrive; None where there are none. Valid until released."""
        arrival = self._rows.get(m)
        return None if arrival is None else arrival.wait()

    def wait_backward(self, m: int) -> Tensor | None:
        """The gradients [R, width] that arrive; None where there are none."""
        # They could only be computed from rows that had left.
        self._channels.forward.wait_sent(m)
        arrival = self._gradients.get(m)
        return None if arrival is None else arrival.wait()

    def wait_sent(self, m: int) -> None:
        """Block until the rows of a microbatch have left."""
        self._channels.forward.wait_sent(m)

    def release_forward(self, m: int) -> None:
        """The rows of a microbatch have been used."""
        if m in self._rows:
            self._rows.pop(m).release()

    def release_backward(self, m: int) -> None:
        """The gradients of a microbatch have been used."""
        if m in self._gradients:
            self._gradients.pop(m).release()

    def drain(self) -> None:
        """Block until everything has left."""
        self._channels.forward.drain()
        self._channels.backward.drain()


def neighbour_plan(peer: int, num_rows: int) -> ModulePlan:
    """The plan of a boundary between two stages of one module: all rows, to and from one rank."""
    messages = (Message(peer, ((0, num_rows),)),)
    return ModulePlan(num_rows=num_rows, sends=messages, receives=messages)


def _outgoing(plans: Sequence[ModulePlan | None] | None, m: int, rows: Tensor) -> Outgoing:
    plan = None if plans is None else plans[m]
    expected = 0 if plan is None else plan.num_rows
    if rows.shape[0] != expected:
        raise RuntimeError(
            f"microbatch {m}: the manifest names {expected} rows to send, but {rows.shape[0]} "
            f"were produced"
        )
    return Outgoing(() if plan is None else plan.sends, rows.contiguous())


def _incoming(plans: Sequence[ModulePlan | None] | None, m: int) -> Incoming | None:
    plan = None if plans is None else plans[m]
    return None if plan is None else Incoming(plan.receives, plan.num_rows)
