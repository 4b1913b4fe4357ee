"""Stand-ins for the parts of `torch.cuda` that megatron-core touches.

Work on a host is synchronous: a stream has nothing pending, an event has happened once it is
recorded. The GPU's random generator is the host's default one, so `torch.manual_seed` and
`torch.cuda.manual_seed` seed the same stream.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor

_HOST = torch.device("cpu")


class HostEvent:
    """Replacement for `torch.cuda.Event` whose work is done; keeps the time of its recording."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self._seconds = time.perf_counter()

    def record(self, stream: object = None) -> None:
        """Keep the present time."""
        self._seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        """Return at once, as nothing is pending."""

    def synchronize(self) -> None:
        """Return at once, as nothing is pending."""

    def query(self) -> bool:
        """Whether the recorded work is done, which is always the case."""
        return True

    def elapsed_time(self, end_event: "HostEvent") -> float:
        """Milliseconds from this event to `end_event`."""
        return (end_event._seconds - self._seconds) * 1e3


class HostStream:
    """Replacement for `torch.cuda.Stream` that never has pending work."""

    device = _HOST
    stream_id = 0
    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority: there is one level."""
        return (0, 0)

    def wait_stream(self, stream: object) -> None:
        """Return at once, as nothing is pending."""

    def wait_event(self, event: object) -> None:
        """Return at once, as nothing is pending."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """Record `event`, or a new one."""
        recorded = event or HostEvent()
        recorded.record(self)
        return recorded

    def synchronize(self) -> None:
        """Return at once, as nothing is pending."""

    def query(self) -> bool:
        """Whether all work is done, which is always the case."""
        return True


class HostExternalStream(HostStream):
    """Replacement for `torch.cuda.ExternalStream` that never has pending work."""


class HostGenerators:
    """`torch.cuda.default_generators`: the host's generator at any index."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _answer(value: object = None) -> Callable[..., Any]:
    """A new function that takes anything and returns `value`.

    New each time: torch's tracer refuses one function under several names.
    """

    def answer(*_args: Any, **_kwargs: Any) -> Any:
        return value

    return answer


def _context() -> Callable[..., AbstractContextManager[None]]:
    """A new function that returns a context manager which does nothing."""

    def context(*_args: Any, **_kwargs: Any) -> AbstractContextManager[None]:
        return nullcontext()

    return context


def _get_rng_state(device: object = "cuda") -> Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: Tensor, device: object = "cuda") -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    # Not torch.manual_seed, which seeds every device and would come back here.
    torch.default_generator.manual_seed(int(seed))


def _manual_seed_all(seed: int) -> None:
    _manual_seed(seed)


def _initial_seed() -> int:
    return torch.default_generator.initial_seed()


def _call_now(callback: Callable[[], Any], **_kwargs: Any) -> None:
    # torch queues such calls until CUDA starts, which on a host is never.
    callback()


_STREAM = HostStream()

# Name in torch.cuda -> stand-in.
_STAND_INS: dict[str, object] = {
    # Devices. A machine may have a GPU that this run does not use.
    "is_available": _answer(False),
    "device_count": _answer(0),
    "set_device": _answer(),
    "device": _context(),
    # Streams and events.
    "Stream": HostStream,
    "ExternalStream": HostExternalStream,
    "Event": HostEvent,
    "current_stream": _answer(_STREAM),
    "default_stream": _answer(_STREAM),
    "set_stream": _answer(),
    "stream": _context(),
    "synchronize": _answer(),
    "is_current_stream_capturing": _answer(False),
    # Memory.
    "empty_cache": _answer(),
    "reset_peak_memory_stats": _answer(),
    # Random state.
    "default_generators": HostGenerators(),
    "_lazy_call": _call_now,
}

# The same functions are reached as torch.cuda.X and as torch.cuda.random.X.
_RANDOM_STAND_INS: dict[str, object] = {
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": _manual_seed,
    "manual_seed_all": _manual_seed_all,
    "initial_seed": _initial_seed,
}


def install(place: torch.device) -> None:
    """Put the stand-ins in `torch.cuda`.

    Args:
        place: What `current_device` answers: the host, or "meta".
    """
    for name, stand_in in (_STAND_INS | _RANDOM_STAND_INS).items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.current_device = _answer(place)
    for name, stand_in in _RANDOM_STAND_INS.items():
        setattr(torch.cuda.random, name, stand_in)
