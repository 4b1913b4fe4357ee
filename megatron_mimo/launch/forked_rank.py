"""Start of a forked rank: what a new interpreter would do, except for the imports."""

import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from megatron_mimo.launch.parent import outlive_parent


def run_rank(target: str, argv: Sequence[str], closing: Path) -> None:
    """Run a module by its name, or a `.py` file, as `python -m` or `python FILE` would.

    The process starts a session of its own, so that Ctrl-C reaches the launcher only.

    Args:
        target: Name of a module, or path to a `.py` file.
        argv: Arguments of the target.
        closing: Path to a file that exists once the launcher ends its ranks.
    """
    os.setsid()
    # torch has it interrupted when its parent ends; its watcher notices that, and says so.
    outlive_parent()
    sys.stdout = _by_line(1, sys.stdout)
    sys.stderr = _by_line(2, sys.stderr)
    is_file = target.endswith(".py")
    sys.argv = [target, *argv]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(target).resolve().parent) if is_file else os.getcwd()
    try:
        if is_file:
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    # After this, a rank waits for the launcher to have heard of all; one that is ending its ranks
    # does not listen, but waits for their processes.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if closing.exists():
        _leave()
    threading.Thread(target=_leave_after_launcher, daemon=True).start()


def _leave_after_launcher() -> None:
    """A launcher that is killed does not hear of any rank again."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    _leave()


def _leave() -> None:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


def _by_line(descriptor: int, like: TextIO) -> TextIO:
    """A stream that writes whole lines, so that those of several ranks do not mix."""
    return open(
        descriptor, "w", buffering=1, encoding=like.encoding, errors=like.errors, closefd=False
    )
