"""The pool itself: starts workers, sends calls, collects answers, heals after a failure."""

import inspect
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.harness.messages import Call, Close, Raised, Ready, Returned, Started
from tests.harness.report import Cut, Died, Outcome, failure_report

REPOSITORY = Path(__file__).resolve().parents[2]
START_LIMIT_S = 240.0
"""For imports (torch, megatron-core, the test's module) and for meeting, on a busy machine."""
FAILURE_GRACE_S = 0.5
"""After the first failing rank, the others may report their own error for this long."""
THREADS_LIMIT = 64
"""A worker that holds more threads is replaced after its call.

megatron-core's DDP refers to itself through autograd's hooks, so the groups it was given are
never freed, and each keeps its gloo threads: hundreds after some twenty training tests, which
then take three times as long.
"""
STACKS_LIMIT_S = 2.0
"""How long a rank may take to write its stacks."""


class RanksFailed(AssertionError):
    """A function failed, died or hung on at least one rank; the text says where and how."""


class RunRanks(Protocol):
    """Type of the `run_ranks` fixture; see `RankPool.run`."""

    def __call__(
        self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0
    ) -> list[Any]: ...


class _Worker:
    """A forked process that answers calls; see `tests.harness.worker`."""

    def __init__(self, folder: Path, number: int) -> None:
        from tests.harness.worker import serve

        context = multiprocessing.get_context("forkserver")
        self._stack_path = folder / f"stacks-{number}"
        self.connection, theirs = context.Pipe()
        # Not a daemon: a test may start data loader processes.
        self.process = context.Process(
            target=serve, args=(theirs, str(self._stack_path)), name=f"rank-worker-{number}"
        )
        self.process.start()
        theirs.close()

    def expect_ready(self, limit_s: float) -> Ready:
        if not self.connection.poll(limit_s):
            raise RanksFailed(f"a worker of the rank pool was not ready after {limit_s:g} s")
        try:
            ready = self.connection.recv()
        except EOFError:
            raise RanksFailed(f"a worker of the rank pool {self.death().summary}") from None
        assert isinstance(ready, Ready)
        if ready.problem is not None:
            raise RanksFailed(f"the rank pool could not import what ranks need\n{ready.problem}")
        return ready

    def death(self) -> Died:
        self.process.join(timeout=STACKS_LIMIT_S)
        return Died(self.process.exitcode, self._stack_path.read_text())

    def stacks(self) -> str:
        """All Python stacks of the process, also when it is stuck in C++."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + STACKS_LIMIT_S
        text = ""
        while time.monotonic() < deadline:
            time.sleep(0.05)
            seen, text = text, self._stack_path.read_text()
            if text and text == seen:
                break
        return text

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class RankPool:
    """Worker processes that act as ranks. Close it at the end of the session.

    Args:
        variables: Environment variables of the process that the workers are forked from; `preload`
            reads them. Pools do not share that process.
    """

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rank-pool-")
        self._variables = dict(variables or {})
        self._parent = forkserver.ForkServer()
        self._workers: list[_Worker] = []
        self._started = 0
        self._calls = 0

    def run(
        self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0
    ) -> list[Any]:
        """Run `fn(*args)` on ranks 0 to world_size - 1 and return what each returned.

        A rank finds a default gloo group of exactly `world_size` ranks, RANK, LOCAL_RANK,
        WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, random numbers newly seeded, one thread,
        and megatron-core imported after the host adaptation. Processes are reused: what `fn`
        leaves in modules is seen by the next call; environment variables are restored.

        Args:
            world_size: number of ranks, all on this machine.
            fn: function on the top level of a module (or a static method of a class there).
            *args: sent to every rank by pickle, as are the results.
            timeout: seconds; a function that takes longer is killed, and shows every rank's stack.

        Raises:
            RanksFailed: a rank raised, died or hung. The workers concerned are replaced.
            ValueError: `fn` cannot be found by its name in another process.
        """
        __tracebackhide__ = True
        template = self._template(fn, args, world_size, timeout)
        workers = self._lease(world_size)
        try:
            outcomes, in_time = self._call(workers, template, timeout)
            failed = not all(isinstance(outcome, Returned) for outcome in outcomes)
            if not failed:
                self._discard(_close(workers))
        except BaseException:
            self._discard(workers)
            raise
        if failed:
            self._discard(workers)
            skips = [o.skipped for o in outcomes if isinstance(o, Raised) and o.skipped is not None]
            if len(skips) == world_size:
                pytest.skip(skips[0])
            raise RanksFailed(
                failure_report(fn.__qualname__, outcomes, None if in_time else timeout)
            )
        return [pickle.loads(o.value) for o in outcomes if isinstance(o, Returned)]

    def close(self) -> None:
        """Kill all workers."""
        self._discard(list(self._workers))
        self._folder.cleanup()

    def _template(
        self, fn: Callable[..., Any], args: tuple[Any, ...], world_size: int, timeout: float
    ) -> dict[str, Any]:
        if "<" in fn.__qualname__ or fn.__module__ == "__main__":
            raise ValueError(
                f"{fn.__module__}.{fn.__qualname__} cannot be found by name in another process: "
                "move it to the top level of the test module"
            )
        self._calls += 1
        return {
            "module": fn.__module__,
            "file": inspect.getfile(inspect.unwrap(fn)),
            "function": fn.__qualname__,
            "arguments": pickle.dumps(args),
            "world_size": world_size,
            "store": str(Path(self._folder.name) / f"store-{self._calls}"),
            "port": _free_port(),
            "sys_path": (str(REPOSITORY), *sys.path),
            "timeout": timeout,
        }

    def _lease(self, world_size: int) -> list[_Worker]:
        missing = world_size - len(self._workers)
        if missing > 0:
            with self._parent_of_workers():
                new = [_Worker(Path(self._folder.name), self._started + i) for i in range(missing)]
            self._started += missing
            try:
                for worker in new:
                    worker.expect_ready(START_LIMIT_S)
            except BaseException:
                for worker in new:
                    worker.kill()
                raise
            self._workers += new
        return self._workers[:world_size]

    @contextmanager
    def _parent_of_workers(self) -> Iterator[None]:
        """For the time in which workers are started, and the parent of all, which preloads."""
        # It prepares this process for hosts, whose tests rely on it, and not for this pool.
        import tests.harness.worker  # noqa: F401

        connect, before = forkserver.connect_to_new_process, dict(os.environ)
        path = [str(REPOSITORY), *filter(None, [before.get("PYTHONPATH")])]
        os.environ.update(self._variables, PYTHONPATH=os.pathsep.join(path))
        self._parent.set_forkserver_preload(["tests.harness.preload"])
        # multiprocessing has one for a whole program, and calls it by this name.
        forkserver.connect_to_new_process = self._parent.connect_to_new_process
        try:
            yield
        finally:
            forkserver.connect_to_new_process = connect
            os.environ.clear()
            os.environ.update(before)

    def _discard(self, workers: list[_Worker]) -> None:
        self._workers = [worker for worker in self._workers if worker not in workers]
        for worker in workers:
            worker.kill()

    def _call(
        self, workers: list[_Worker], template: dict[str, Any], timeout: float
    ) -> tuple[list[Outcome], bool]:
        """Returns the outcome of each rank, and whether the limit was kept."""
        answers: dict[int, Outcome] = {}
        for rank, worker in enumerate(workers):
            try:
                worker.connection.send(Call(rank=rank, **template))
            except BrokenPipeError:
                answers[rank] = worker.death()
        absent = set(range(len(workers)))
        deadline = time.monotonic() + START_LIMIT_S
        cut_at: float | None = None
        while len(answers) < len(workers):
            if cut_at is None and any(not isinstance(o, Returned) for o in answers.values()):
                cut_at = time.monotonic() + FAILURE_GRACE_S
            remaining = min(deadline, cut_at or deadline) - time.monotonic()
            waiting = {w.connection: r for r, w in enumerate(workers) if r not in answers}
            ready = wait(list(waiting), timeout=max(0.0, remaining))
            if not ready and remaining <= 0:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                answer = _receive(workers[rank])
                if not isinstance(answer, Started):
                    answers[rank] = answer
                elif absent:
                    absent.discard(rank)
                    deadline = deadline if absent else time.monotonic() + timeout
        in_time = len(answers) == len(workers) or cut_at is not None
        for rank, worker in enumerate(workers):
            if rank not in answers:
                answers[rank] = Cut(worker.stacks())
        return [answers[rank] for rank in range(len(workers))], in_time


def _receive(worker: _Worker) -> Outcome | Started:
    try:
        answer = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        return worker.death()
    assert isinstance(answer, Started | Returned | Raised)
    return answer


def _close(workers: list[_Worker]) -> list[_Worker]:
    """Let all ranks leave the process group, only now that nobody needs it any more.

    Returns the workers that hold too many threads to be of further use.
    """
    for worker in workers:
        worker.connection.send(Close())
    ready = [worker.expect_ready(START_LIMIT_S) for worker in workers]
    return [
        worker
        for worker, state in zip(workers, ready, strict=True)
        if state.threads > THREADS_LIMIT
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
