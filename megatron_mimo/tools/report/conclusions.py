"""Conclusions on a run: a rule each, from measurements to a sentence and what to try."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from megatron_mimo.tools.report.measured import LEAST_ITERATIONS, Measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Conclusion:
    """A sentence on a run.

    Attributes:
        found: Description of what was measured, with the numbers, and of what it means.
        advice: Description of what to do, without the flags; empty where these say it all.
        flags: Flags to try, by name without leading dashes, with values that this run can take;
            empty for none.
    """

    found: str
    advice: str = ""
    flags: Mapping[str, object] = field(default_factory=dict)

    @property
    def tokens(self) -> str:
        """The flags as typed; empty for none."""
        return " ".join(
            f"--{name}" if value is True else f"--{name} {value}"
            for name, value in self.flags.items()
        )

    @property
    def text(self) -> str:
        """All of it as plain text."""
        tried = f"try {self.tokens}" if self.flags else ""
        whole = "; ".join(part for part in (self.found, self.advice, tried) if part)
        return f"{whole[0].upper()}{whole[1:]}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A rule, which is a row of the table in docs/how-to/report.md.

    Attributes:
        name: Name of the rule.
        threshold: Threshold; the rule says nothing of a run that is not above it.
        percent: Whether the threshold is a share, which is written in per cent.
        fires: Condition in words, with {} in the place of the threshold.
        tries: Description of what it suggests, in words.
        find: Function that returns the conclusions on a run, given the threshold.
        of_times: Whether the rule judges times or balance, which takes some iterations.
    """

    name: str
    threshold: float
    percent: bool = True
    fires: str
    tries: str
    find: Callable[[Measured, float], Iterator[Conclusion]]
    of_times: bool = False

    @property
    def condition(self) -> str:
        """The condition in words, with the threshold."""
        value = f"{self.threshold * 100:g} %" if self.percent else f"{self.threshold:g}"
        return self.fires.format(value)

    def apply(self, run: Measured) -> Iterator[Conclusion]:
        """Conclusions on a run; none where it is too short for this rule."""
        if not self.of_times or run.is_long_enough:
            yield from self.find(run, self.threshold)


def conclude(run: Measured, rules: tuple[Rule, ...]) -> list[tuple[Rule, Conclusion]]:
    """Every conclusion of some rules on a run, in the order of the rules."""
    return [(rule, conclusion) for rule in rules for conclusion in rule.apply(run)]


def nothing_found(run: Measured) -> str:
    """Sentence on a run of which no rule says anything."""
    if not run.is_long_enough:
        return (
            f"Too short to judge where its time goes: that takes {LEAST_ITERATIONS} iterations "
            f"since the last start, and some log lines."
        )
    if not run.modules:
        return (
            "No rule found anything to change in the curves. The run did not measure where the "
            "time of a step goes."
        )
    return "No rule found anything to change."
