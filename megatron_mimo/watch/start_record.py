"""Record of each start of a run: its time, flags, software and machine."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_mimo.checkpoint.progress import Progress
from megatron_mimo.config.flags import flat
from megatron_mimo.config.resolve import Resolved
from megatron_mimo.runtime import RuntimeContext
from megatron_mimo.runtime.software import machine, software, variables

STARTS_FILE = "starts.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRecord:
    """One start of a run; a run that was resumed has several.

    Attributes:
        time: Time of the start in ISO 8601, with the time zone.
        iteration: Last iteration before this start; 0 for a new run.
        consumed_samples: Number of samples trained on before this start.
        train_iters: Iteration at which training is to end.
        world_size: Number of ranks.
        layout: Grids of all modules, as the start-up log shows them.
        flags: Value of every flag in this start.
        command: Arguments after the program's name.
        software: Version of each program or library by name.
        machine: Description of the logging rank's machine.
        kernels: Descriptions of what computes, one line each.
        variables: Environment variables that affect the run.
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
        """JSON text of one line."""
        return json.dumps(dataclasses.asdict(self))


def start_record(
    resolved: Resolved,
    context: RuntimeContext,
    progress: Progress,
    argv: Sequence[str],
    kernels: Sequence[str],
) -> StartRecord:
    """Record of this start, as seen from this rank.

    Args:
        resolved: Settings of the run.
        context: Rank, world size and device of this process.
        progress: Iteration and samples from which the run continues.
        argv: Arguments after the program's name.
        kernels: Descriptions of what computes, one line each.
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
    """Starts of a run, in order; none where the run recorded none.

    Raises:
        ValueError: A line is damaged.
    """
    path = folder / STARTS_FILE
    if not path.exists():
        return []
    starts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            starts.append(StartRecord(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected what a run writes when it starts: {error}"
            ) from error
    return starts
