"""Roles of a dry run: `python -m megatron_mimo.tools.plan.dry_run.worker`.

Reads a request from standard input, and writes the outcome of each role to a file that the request
names. Each role is a process of its own, since what makes a rank one on paper stays in a process
for its life, and since a fault, or the kernel's killing of one that needs too much memory, leaves
the other roles alone. Several are forked from one that has imported what they need.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_mimo.launch.parent import end_with_parent
from megatron_mimo.runtime import prepare_megatron_core
from megatron_mimo.runtime.exit_code import how_it_ended
from megatron_mimo.runtime.paper.groups import PAPER
from megatron_mimo.tools.plan.dry_run.rank import run_role
from megatron_mimo.tools.plan.dry_run.result import Fault, Outcome

# What every role imports; it imports megatron-core, so it comes after that is prepared.
_NEEDED = (
    "megatron_mimo.kernels.outlines",
    "megatron_mimo.runtime.paper.experts",
    "megatron_mimo.tools.plan.dry_run.samples",
    "megatron_mimo.training.setup",
    "megatron_mimo.training.step",
)


def main() -> None:
    """Run the request."""
    request = json.load(sys.stdin)
    if sys.platform == "linux":
        end_with_parent(request["parent"])
    roles = [(rank, Path(path)) for rank, path in request["roles"]]
    if len(roles) == 1:
        _run_one(request, *roles[0])
    else:
        _fork_each(request, roles)


def _run_one(request: Mapping[str, Any], rank: int, result: Path) -> None:
    _write(
        result,
        run_role(
            request["argv"],
            rank=rank,
            world_size=request["world_size"],
            vocab_size=request["vocab_size"],
        ),
    )


def _fork_each(request: Mapping[str, Any], roles: Sequence[tuple[int, Path]]) -> None:
    """Fork a process for each role, as many at once as there are cores."""
    prepare_megatron_core(PAPER)
    for name in _NEEDED:
        import_module(name)
    # So that children share this memory.
    gc.freeze()
    running: dict[int, Path] = {}
    this = os.getpid()
    for rank, result in roles:
        while len(running) >= len(os.sched_getaffinity(0)):
            _await_one(running)
        child = os.fork()
        if child == 0:
            try:
                end_with_parent(this)
                _run_one(request, rank, result)
                # Thousands of tensors and groups need not be taken apart.
                os._exit(0)
            finally:
                os._exit(1)
        running[child] = result
    while running:
        _await_one(running)


def _await_one(running: dict[int, Path]) -> None:
    """Wait until a role's process ends; say so for one that could not."""
    child, status = os.wait()
    result = running.pop(child)
    if not result.exists():
        code = os.waitstatus_to_exitcode(status)
        reason = f"it {how_it_ended(code)}, before it could say why; is there enough memory?"
        fault = Fault(where="its process failed", reason=reason, traceback="")
        _write(result, Outcome(fault=fault))


def _write(path: Path, outcome: Outcome) -> None:
    """Write an outcome, whole or not at all."""
    written = path.with_suffix(".part")
    written.write_text(json.dumps(outcome.to_json()))
    written.replace(path)


if __name__ == "__main__":
    # Of Ctrl-C the parent makes an end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
