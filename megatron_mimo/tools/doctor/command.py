"""Whether this machine can train, and what keeps it from it: `megatron-mimo doctor`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from megatron_mimo.settings import Folder, Number, Switch, Within, check_bounds
from megatron_mimo.settings.ranges import MOST_RANKS
from megatron_mimo.tools.doctor.diagnose import diagnose, verdict
from megatron_mimo.tools.doctor.facts import Facts, Finding, Question
from megatron_mimo.tools.doctor.gather import gather

EXIT_OK, EXIT_FAULT = 0, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Look at what a run needs of this machine, and say what to do where something is missing.

    Each line is ok, a warning (a run will be slower, or may fail), or a fault (it will fail). The
    exit code is 1 where there is a fault.

    Attributes:
        device: Kind of device that the ranks are to compute on; auto takes cuda where there is one.
        ranks: Number of ranks of the run, on all machines: it decides how many files a rank opens.
        local_ranks: Number of ranks on this machine; left out: one for each GPU, on a host 2.
        save: Folder of checkpoints, whose disk is looked at.
        json: Print one object with every finding and fact, for programs.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks: Annotated[int, Within(1, MOST_RANKS)] = 8
    local_ranks: Annotated[Number, Within(1, MOST_RANKS)] = None
    save: Folder = None
    json: Switch = False

    def __post_init__(self) -> None:
        check_bounds(self)


def run_doctor(config: DoctorConfig) -> int:
    """Ask the machine, judge what it says, and print it.

    Returns:
        0 where nothing is a fault, else 1.
    """
    local_ranks = None if config.local_ranks is None else int(config.local_ranks)
    facts = gather(
        Question(
            device=config.device, ranks=config.ranks, local_ranks=local_ranks, save=config.save
        )
    )
    findings = diagnose(facts)
    sys.stdout.write(as_json(facts, findings) if config.json else as_text(findings))
    return EXIT_FAULT if any(finding.state == "fault" for finding in findings) else EXIT_OK


def as_text(findings: Sequence[Finding]) -> str:
    """A line for each finding, and one on all."""
    width = max(len(finding.check) for finding in findings)
    lines = [f"{f.state:<8} {f.check:<{width}}  {f}" for f in findings]
    return "\n".join([*lines, verdict(findings)]) + "\n"


def as_json(facts: Facts, findings: Sequence[Finding]) -> str:
    """The complete result, for other programs."""
    result = {
        "verdict": verdict(findings),
        "findings": [asdict(finding) for finding in findings],
        "facts": asdict(facts),
    }
    return json.dumps(result, indent=2) + "\n"
