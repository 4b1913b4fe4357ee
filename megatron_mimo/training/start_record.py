"""What is kept of each start of a run: when, with which flags, and on what it stands."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_mimo.checkpoint.progress import Progress
from megatron_mimo.runtime import RuntimeContext
from megatron_mimo.runtime.software import machine, software, variables
from megatron_mimo.training.flags import flat
from megatron_mimo.training.resolve import Resolved

STARTS_FILE = "starts.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRecord:
    """One start; a run that was resumed has several.

    Attributes:
        time: ISO 8601, with the time zone.
        iteration: The last one before this start; 0 for a new run.
        consumed_samples: Before this start.
        train_iters: The iteration at which training is to end.
        world_size: Number of ranks.
        layout: Both grids, as the start-up log shows them.
        flags: Every flag as it was used.
        command: What was typed behind the program's name.
        software: Name -> version.
        machine: Of the logging rank.
        kernels: What computes, a line each.
        variables: Of the environment.
    """

    time: str
    iteration: int
    consumed_samples: int
    train_iters: int
    world_size: int
    layout: str
    flags: Mapping[str, Any]
    command: Sequence[str]
    software: Mapping[str, str]
    machine: Mapping[str, str]
    kernels: Sequence[str]
    variables: Mapping[str, str]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))


def start_record(
    resolved: Resolved,
    context: RuntimeContext,
    progress: Progress,
    argv: Sequence[str],
    kernels: Sequence[str],
) -> StartRecord:
    """Of this start, told by this rank.

    Args:
        resolved: The run.
        context: This rank.
        progress: Where the run goes on.
        argv: Arguments behind the program's name.
        kernels: What computes, a line each.
    """
    return StartRecord(
        time=datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
        iteration=progress.iteration,
        consumed_samples=progress.consumed_samples,
        train_iters=resolved.train_iters,
        world_size=context.world_size,
        layout=resolved.layout.table(),
        flags=flat(resolved.config),
        command=list(argv),
        software=software(),
        machine=machine(context.device),
        kernels=kernels,
        variables=variables(os.environ),
    )


def read_starts(folder: Path) -> list[StartRecord]:
    """The starts of a run, in order; none where it kept none.

    Raises:
        ValueError: A line is damaged.
    """
    path = folder / STARTS_FILE
    if not path.exists():
        return []
    starts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            starts.append(StartRecord(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected what a run writes when it starts: {error}"
            ) from error
    return starts
