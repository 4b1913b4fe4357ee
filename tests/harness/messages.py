"""What the pool and its workers say to each other."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """Run one function on one rank.

    Attributes:
        module: name of the module that holds the function.
        file: source file of that module, to be sure that both sides mean the same one.
        function: qualified name of the function in its module.
        arguments: the pickled tuple of arguments.
        rank: rank in the default process group.
        world_size: number of ranks of this call.
        store: path of the rendezvous file, new for each call.
        port: a free TCP port for `MASTER_PORT`.
        sys_path: import path of the pytest process.
        timeout: limit of the function in seconds, after which the pool kills the rank.
    """

    module: str
    file: str
    function: str
    arguments: bytes
    rank: int
    world_size: int
    store: str
    port: int
    sys_path: tuple[str, ...]
    timeout: float


@dataclass(frozen=True, slots=True)
class Close:
    """All ranks of the call have answered: leave the process group."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker waits for its next call.

    Attributes:
        problem: a traceback when it could not start.
        threads: threads that its process holds.
    """

    problem: str | None = None
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Started:
    """The rank has joined the process group; the call's limit counts from the last of these."""


@dataclass(frozen=True, slots=True)
class Returned:
    """The function returned; `value` is the pickled result."""

    value: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Raised:
    """The function raised.

    Attributes:
        summary: type and message of the exception, one line or more.
        traceback: as Python prints it, from the test's function on.
        moment: seconds of the machine's monotonic clock, to see which rank was first.
        skipped: the reason, when the function called `pytest.skip`.
    """

    summary: str
    traceback: str
    moment: float
    skipped: str | None = None
