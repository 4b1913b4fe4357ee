"""One rank of the pool: waits for calls, runs each in a fresh process group, answers."""

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.harness import preload
from tests.harness.messages import Call, Close, Raised, Ready, Returned, Started

GLOO_GRACE_S = 60
"""Gloo's own limit lies this much above the call's, so that a hang is cut by the pool."""

SEED = 1234
"""Every call starts from this seed of Python, numpy and torch."""


def serve(connection: Connection, stack_path: str) -> None:
    """Answer calls until the pytest process goes away.

    Args:
        connection: to the pool.
        stack_path: file that receives all Python stacks of this process upon SIGUSR1.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stacks = open(stack_path, "w")  # stays open as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    faulthandler.enable(file=stacks, all_threads=True)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    connection.send(Ready(preload.problem))
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        with _process_environment(call):
            connection.send(_answer(call, connection))
            close = connection.recv()
            assert isinstance(close, Close)
            _leave_process_group()
        connection.send(Ready(threads=_threads()))


def _threads() -> int:
    """All threads of the process, those of C++ too; 1 where the system does not say."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 1


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(call: Call, connection: Connection) -> Returned | Raised:
    try:
        function = _find_function(call)
        arguments = pickle.loads(call.arguments)
        _reset_random_numbers()
        _join_process_group(call)
        connection.send(Started())
        value = function(*arguments)
        try:
            return Returned(pickle.dumps(value))
        except Exception as error:
            raise TypeError(
                f"{call.function} returned a {type(value).__name__} that cannot be pickled: {error}"
            ) from error
    except BaseException as error:
        return _describe(error)


def _describe(error: BaseException) -> Raised:
    moment = time.monotonic()
    frames = error.__traceback__
    if frames is not None and frames.tb_next is not None:
        frames = frames.tb_next  # leaves out `_answer`
    return Raised(
        summary="".join(traceback.format_exception_only(error)).strip(),
        traceback="".join(traceback.format_exception(type(error), error, frames)),
        moment=moment,
        skipped=str(error) if type(error).__name__ == "Skipped" else None,
    )


def _find_function(call: Call) -> Callable[..., Any]:
    for entry in call.sys_path:
        if entry not in sys.path:
            sys.path.append(entry)
    module = importlib.import_module(call.module)
    found = getattr(module, "__file__", None)
    if found is None or Path(found).resolve() != Path(call.file).resolve():
        raise ImportError(
            f"module {call.module} is {found} in the rank, but {call.file} in pytest: "
            "two test modules share a name, give them different ones"
        )
    function: Any = module
    for part in call.function.split("."):
        function = getattr(function, part)
    return function  # type: ignore[no-any-return]


@contextmanager
def _process_environment(call: Call) -> Iterator[None]:
    """Set what torchrun sets, and restore variables and working folder afterwards."""
    variables = dict(os.environ)
    folder = os.getcwd()
    os.environ.update(
        RANK=str(call.rank),
        LOCAL_RANK=str(call.rank),
        WORLD_SIZE=str(call.world_size),
        LOCAL_WORLD_SIZE=str(call.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(call.port),
    )
    try:
        yield
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)


def _join_process_group(call: Call) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        store=dist.FileStore(call.store, call.world_size),
        rank=call.rank,
        world_size=call.world_size,
        timeout=timedelta(seconds=call.timeout + GLOO_GRACE_S),
    )


def _leave_process_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _reset_random_numbers() -> None:
    """Put the process-wide numerical state back to where a new process would have it."""
    import numpy
    import torch

    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if torch.are_deterministic_algorithms_enabled():  # the setter imports a lot
        torch.use_deterministic_algorithms(False)
    tracker = sys.modules.get("megatron.core.tensor_parallel.random")
    if tracker is not None:
        tracker.get_cuda_rng_tracker().reset()
