"""What each rank does in a step, in order: a pure function of its role and the microbatches.

The language model runs forward and backward of one microbatch after another, with the next
microbatch's rows already asked for. The encoder runs ahead of it by `run_ahead` microbatches, so
that it encodes while the language model computes. A rank that holds both modules runs each
microbatch through both and needs no run-ahead.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """One kind of work."""

    ENCODE = "encode"
    SEND_ROWS = "send rows"
    POST_ROWS = "post rows"
    WAIT_ROWS = "wait rows"
    FORWARD = "forward"
    BACKWARD = "backward"
    SEND_GRADS = "send grads"
    POST_GRADS = "post grads"
    WAIT_GRADS = "wait grads"
    ENCODE_BACKWARD = "encode backward"


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a schedule.

    Attributes:
        kind: What to do.
        microbatch: Index within the step.
    """

    kind: Kind
    microbatch: int


def step_actions(
    *,
    encoder: bool,
    language: bool,
    num_microbatches: int,
    run_ahead: int,
    gradients: bool,
    encoder_trains: bool,
) -> tuple[Action, ...]:
    """The actions of one rank in one step.

    Args:
        encoder: Whether the rank holds the encoder.
        language: Whether the rank holds the language model.
        num_microbatches: Microbatches of the step.
        run_ahead: Microbatches that the encoder may be ahead of the gradients it has used.
        gradients: False for evaluation.
        encoder_trains: Whether gradients cross the bridge.
    """
    returns = gradients and encoder_trains
    if encoder and language:
        return tuple(_both(num_microbatches, gradients=gradients, returns=returns))
    if encoder:
        return tuple(_encoder(num_microbatches, run_ahead, returns=returns))
    return tuple(_language(num_microbatches, gradients=gradients, returns=returns))


def _encoder(num_microbatches: int, run_ahead: int, *, returns: bool) -> Iterator[Action]:
    depth = min(run_ahead + 1, num_microbatches) if returns else num_microbatches
    for m in range(depth):
        yield from _encode(m, returns=returns)
    if returns:
        for m in range(num_microbatches):
            yield from _encode_backward(m)
            if m + depth < num_microbatches:
                yield from _encode(m + depth, returns=returns)


def _language(num_microbatches: int, *, gradients: bool, returns: bool) -> Iterator[Action]:
    yield Action(Kind.POST_ROWS, 0)
    for m in range(num_microbatches):
        if m + 1 < num_microbatches:
            yield Action(Kind.POST_ROWS, m + 1)
        yield from _forward_backward(m, gradients=gradients, returns=returns)


def _both(num_microbatches: int, *, gradients: bool, returns: bool) -> Iterator[Action]:
    for m in range(num_microbatches):
        yield Action(Kind.POST_ROWS, m)
        yield from _encode(m, returns=returns)
        yield from _forward_backward(m, gradients=gradients, returns=returns)
        if returns:
            yield from _encode_backward(m)


def _encode(m: int, *, returns: bool) -> Iterator[Action]:
    yield Action(Kind.ENCODE, m)
    yield Action(Kind.SEND_ROWS, m)
    if returns:
        yield Action(Kind.POST_GRADS, m)


def _encode_backward(m: int) -> Iterator[Action]:
    yield Action(Kind.WAIT_GRADS, m)
    yield Action(Kind.ENCODE_BACKWARD, m)


def _forward_backward(m: int, *, gradients: bool, returns: bool) -> Iterator[Action]:
    yield Action(Kind.WAIT_ROWS, m)
    yield Action(Kind.FORWARD, m)
    if gradients:
        yield Action(Kind.BACKWARD, m)
    if returns:
        yield Action(Kind.SEND_GRADS, m)
