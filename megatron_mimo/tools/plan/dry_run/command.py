"""`megatron-mimo plan --dry-run`: one process for each role, and what they found."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from megatron_mimo.border import printable, shows_tracebacks
from megatron_mimo.config.arguments import without_flags
from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.resolve import resolve
from megatron_mimo.runtime.exit_code import how_it_ended
from megatron_mimo.settings import Within, check_bounds
from megatron_mimo.settings.ranges import MOST_RANKS
from megatron_mimo.tools.plan.dry_run import FLAG
from megatron_mimo.tools.plan.dry_run.result import Fault, Outcome
from megatron_mimo.tools.plan.dry_run.roles import Role, distinct_roles
from megatron_mimo.tools.plan.dry_run.table import NOTES, show

_WORKER = "megatron_mimo.tools.plan.dry_run.worker"
_POLL_S = 0.05
_FAILED = 1
_OWN = ("--nproc", "--vocab-size")


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRunCommandLine(CommandLine):
    """Run a training step of every distinct role of a layout on this machine, without content.

    The other flags are those of training.

    Attributes:
        dry_run: Build and step each role with tensors that have shapes only.
        nproc: Number of ranks of the run.
        vocab_size: Number of tokens of the vocabulary; left out: that of the tokenizer, which is
            then read.
    """

    dry_run: FlagCreatePairsOff[bool] = False
    nproc: Annotated[int | None, arg(metavar="N", help_behavior_hint=""), Within(1, MOST_RANKS)] = (
        None
    )
    vocab_size: Annotated[int | None, arg(metavar="N", help_behavior_hint=""), Within(1, 10**9)] = (
        None
    )


def run_dry_run(argv: Sequence[str]) -> int:
    """Step every distinct role, and print what each holds and sends.

    Args:
        argv: Flags of `megatron-mimo train`, and those of `DryRunCommandLine`.

    Returns:
        Exit code 0, or 1 where a role has a fault.

    Raises:
        ValueError: A flag is wrong, or the grids do not cover the ranks.
    """
    line = parse(argv, DryRunCommandLine, prog="megatron-mimo plan --dry-run")
    world_size = line.nproc
    if world_size is None:
        raise ValueError("--dry-run needs --nproc N: the number of ranks of the run")
    check_bounds(line)
    resolved = resolve(line.train, world_size)
    if resolved.reduce.sharding == "fsdp2":
        raise ValueError(
            "--dry-run with --sharding fsdp2: torch's fully_shard does not run on weights without "
            "content; plan --params counts those of a rank, and a dry run without --sharding shows "
            "everything else"
        )
    layout = resolved.layout
    roles = distinct_roles(layout)
    sys.stdout.write(f"{layout.table()}\n\n")
    faults = []
    for role, outcome in step_roles(
        roles, _without_own(argv), world_size=world_size, vocab_size=line.vocab_size
    ):
        show(role, outcome)
        sys.stdout.flush()
        if outcome.fault is not None:
            faults.append((role, outcome.fault))
    if not faults:
        sys.stdout.write(f"{NOTES}\n")
    for role, fault in faults:
        if shows_tracebacks():
            sys.stderr.write(printable(fault.traceback))
        sys.stderr.write(printable(f"error: {role}: {fault.where}: {fault.reason}\n"))
    return _FAILED if faults else 0


def step_roles(
    roles: Sequence[Role], argv: Sequence[str], *, world_size: int, vocab_size: int | None
) -> Iterator[tuple[Role, Outcome]]:
    """Run a process for each role, as many at once as there are cores; in the order of the roles.

    All processes end with this one, however it ends.

    Args:
        roles: Roles to step.
        argv: Flags of `megatron-mimo train`.
        world_size: Number of ranks of the run.
        vocab_size: Number of tokens of the vocabulary in the place of the tokenizer's; None reads
            the tokenizer.
    """
    request = {
        "argv": list(argv),
        "world_size": world_size,
        "vocab_size": vocab_size,
        "parent": os.getpid(),
    }
    with tempfile.TemporaryDirectory(prefix="megatron-mimo-") as name:
        results = [Path(name) / f"{number}.json" for number in range(len(roles))]
        tasks = list(zip(roles, results, strict=True))
        # Elsewhere processes that have imported torch cannot be forked: one after the other there.
        batches = [tasks] if sys.platform == "linux" else [[task] for task in tasks]
        for batch in batches:
            worker = _Worker(Path(name), request, [(role.rank, result) for role, result in batch])
            try:
                for role, result in batch:
                    yield role, worker.outcome(result)
            finally:
                worker.end()


class _Worker:
    """The process that runs some roles, each in one of its own."""

    def __init__(
        self, folder: Path, request: dict[str, Any], tasks: Sequence[tuple[int, Path]]
    ) -> None:
        self._errors = folder / "errors"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        roles = [(rank, str(result)) for rank, result in tasks]
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps(request | {"roles": roles}).encode())

    def outcome(self, result: Path) -> Outcome:
        """What a role found, or how its process ended without having said so."""
        while not result.exists():
            if self._process.poll() is not None and not result.exists():
                return self._failure()
            time.sleep(_POLL_S)
        return Outcome.from_json(json.loads(result.read_text()))

    def _failure(self) -> Outcome:
        code = self._process.returncode
        said = self._errors.read_text(errors="replace").strip()
        reason = f"it {how_it_ended(code)}: {said.splitlines()[-1] if said else 'it said nothing'}"
        return Outcome(fault=Fault(where="its process failed", reason=reason, traceback=said))

    def end(self) -> None:
        """End it, and the processes of its roles with it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def _without_own(argv: Sequence[str]) -> list[str]:
    """The flags of training."""
    return without_flags([one for one in argv if one.replace("_", "-") != FLAG], _OWN)
