"""What is known of a machine, as plain values: probes find it out, `diagnose` judges it.

Between the two it travels as JSON, so that the facts of another machine can be judged too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What the user means to run.

    Attributes:
        device: Kind of device that the ranks compute on, as in `--device` of training.
        ranks: Number of ranks of the run, on all machines.
        local_ranks: Number of them on this machine; None for one on each GPU, or 2 on a host.
        save: Folder of checkpoints; None where the run saves none.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks: int = 8
    local_ranks: int | None = None
    save: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the probes have found.

    Attributes:
        question: What the user means to run.
        answers: Values of each probe by name, in the form that `probes` describes.
        silent: Reason why a probe has no values, by its name, such as "took longer than 60 s".
    """

    question: Question = field(default_factory=Question)
    answers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    silent: Mapping[str, str] = field(default_factory=dict)

    def of(self, probe: str) -> Mapping[str, Any] | None:
        """Values of a probe; None where it has none."""
        return self.answers.get(probe)

    @property
    def gpus(self) -> list[Mapping[str, Any]]:
        """GPUs that torch sees."""
        return list((self.of("gpus") or {}).get("gpus", []))

    @property
    def on_gpu(self) -> bool:
        """Whether the run is meant to compute on GPUs."""
        return self.question.device == "cuda" or (
            self.question.device == "auto" and bool(self.gpus)
        )

    @property
    def local_ranks(self) -> int:
        """Number of ranks on this machine."""
        if self.question.local_ranks is not None:
            return self.question.local_ranks
        return max(1, len(self.gpus)) if self.on_gpu else 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        state: Whether a run will do ("ok"), will suffer ("warning"), or will fail ("fault").
        check: Name of what was looked at.
        found: What is there.
        expected: What should be there; empty where all is well.
        remedy: What to do; empty where all is well.
    """

    state: Literal["ok", "warning", "fault"]
    check: str
    found: str
    expected: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        """The line without its name and state."""
        text = self.found
        if self.expected:
            text += f": expected {self.expected}"
        return f"{text}; {self.remedy}" if self.remedy else text


def ok(check: str, found: str) -> Finding:
    """Nothing is wrong."""
    return Finding(state="ok", check=check, found=found)


def warning(check: str, found: str, expected: str, remedy: str) -> Finding:
    """Something is worse than it should be."""
    return Finding(state="warning", check=check, found=found, expected=expected, remedy=remedy)


def fault(check: str, found: str, expected: str, remedy: str) -> Finding:
    """A run will fail."""
    return Finding(state="fault", check=check, found=found, expected=expected, remedy=remedy)
