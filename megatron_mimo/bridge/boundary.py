"""The boundary between two stages, and the transfers over it in a step, as one rank sees them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mimo.bridge.plan import Message, RankPlan
from megatron_mimo.bridge.transport import Channel, Incoming, Outgoing, Pending


@dataclass(frozen=True, kw_only=True, slots=True)
class Boundary:
    """Both directions between two stages; they exist for the whole run and keep their buffers.

    The boundary between a source and the target is the *bridge* along their edge.

    Attributes:
        forward: Channel of rows or hidden states.
        backward: Channel of their gradients.
    """

    forward: Channel
    backward: Channel


class Traffic:
    """Transfers over a boundary in one step.

    Args:
        boundary: Both directions of the boundary.
        source: Plan of each microbatch for the side that produces rows, None for a microbatch
            without rows of this rank; None where this rank does not hold that side.
        target: Plan of each microbatch for the side that uses the rows, with None as in `source`.
        returns: Whether gradients are sent back, for each microbatch.
    """

    def __init__(
        self,
        boundary: Boundary,
        *,
        source: Sequence[RankPlan | None] | None,
        target: Sequence[RankPlan | None] | None,
        returns: Sequence[bool],
    ) -> None:
        self.returns = returns
        self._boundary = boundary
        self._source = source
        self._target = target
        self._rows: dict[int, Pending] = {}
        self._gradients: dict[int, Pending] = {}

    @property
    def has_both_ends(self) -> bool:
        """Whether this rank both produces and uses rows of this boundary."""
        return self._source is not None and self._target is not None

    def post_forward(self, m: int, rows: Tensor | None) -> None:
        """Post the sends and receives of a microbatch's rows.

        Args:
            m: Index of the microbatch within the step.
            rows: Rows to send [R, width] in the channel's dtype; None to receive only.

        Raises:
            RuntimeError: The rows have another shape or dtype than the manifest and the channel
                say; peers would wait for them, or read other numbers.
        """
        arrival = self._boundary.forward.post(
            m,
            None if rows is None else _outgoing(self._boundary.forward, self._source, m, rows),
            _incoming(self._target, m),
        )
        if arrival is not None:
            self._rows[m] = arrival

    def post_backward(self, m: int, gradients: Tensor | None) -> None:
        """Post the sends and receives of the gradients of a microbatch's rows.

        Args:
            m: Index of the microbatch within the step.
            gradients: Gradients to send [R, width] in the channel's dtype; None to receive only.
        """
        if gradients is not None:
            # Receives of gradients are posted before these can be computed, so the earlier
            # sends have completed or soon will; this frees them where a backend cannot be polled.
            self._boundary.backward.drain()
        arrival = self._boundary.backward.post(
            m,
            None
            if gradients is None
            else _outgoing(self._boundary.backward, self._target, m, gradients),
            _incoming(self._source, m),
        )
        if arrival is not None:
            self._gradients[m] = arrival

    def wait_forward(self, m: int) -> Tensor | None:
        """Wait for the received rows [R, width]; None without any. Valid until released."""
        arrival = self._rows.get(m)
        return None if arrival is None else arrival.wait()

    def wait_backward(self, m: int) -> Tensor | None:
        """Wait for the received gradients [R, width]; None without any. Valid until released."""
        # They could only be computed from rows that had been sent.
        self._boundary.forward.wait_sent(m)
        arrival = self._gradients.get(m)
        return None if arrival is None else arrival.wait()

    def wait_sent(self, m: int) -> None:
        """Block until the rows of a microbatch have been sent."""
        self._boundary.forward.wait_sent(m)

    def release_forward(self, m: int) -> None:
        """Release the buffers of a microbatch's rows, which have been used."""
        if m in self._rows:
            self._rows.pop(m).release()

    def release_backward(self, m: int) -> None:
        """Release the buffers of a microbatch's gradients, which have been used."""
        if m in self._gradients:
            self._gradients.pop(m).release()

    def drain(self) -> None:
        """Block until everything has been sent."""
        self._boundary.forward.drain()
        self._boundary.backward.drain()


def neighbour_plan(peer: int, num_rows: int) -> RankPlan:
    """The plan of a boundary between two stages of one module: one peer exchanges all rows."""
    messages = (Message(peer, ((0, num_rows),)),)
    return RankPlan(num_rows=num_rows, sends=messages, receives=messages)


def _outgoing(
    channel: Channel, plans: Sequence[RankPlan | None] | None, m: int, rows: Tensor
) -> Outgoing:
    plan = None if plans is None else plans[m]
    require_rows(
        rows,
        shape=(0 if plan is None else plan.num_rows, channel.width),
        dtype=channel.dtype,
        where=f"microbatch {m}, {channel.name}",
    )
    return Outgoing(() if plan is None else plan.sends, rows.contiguous())


def require_rows(rows: Tensor, *, shape: tuple[int, int], dtype: torch.dtype, where: str) -> None:
    """Refuse rows that peers do not expect: they would wait for them, or read other numbers.

    Args:
        rows: Rows to send, expected to be [R, width].
        shape: The number of rows by the manifest, and their width.
        dtype: Dtype that both ends of the channel have.
        where: Name of the microbatch and of the rows.

    Raises:
        RuntimeError: The shape or the dtype differs.
    """
    if tuple(rows.shape) != shape or rows.dtype != dtype:
        raise RuntimeError(
            f"{where}: expected {_described(shape, dtype)} by the manifest and the model's widths, "
            f"but the module gave {_described(tuple(rows.shape), rows.dtype)}"
        )


def _described(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _incoming(plans: Sequence[RankPlan | None] | None, m: int) -> Incoming | None:
    plan = None if plans is None else plans[m]
    return None if plan is None else Incoming(plan.receives, plan.num_rows)
