"""From facts to findings, without a look at the machine."""

from collections.abc import Sequence

from megatron_mimo.tools.doctor.facts import Facts, Finding
from megatron_mimo.tools.doctor.gpus import collective, gpus
from megatron_mimo.tools.doctor.machine import machine
from megatron_mimo.tools.doctor.software import software


def diagnose(facts: Facts) -> list[Finding]:
    """Judge what is known of a machine: software, GPUs, the system, the sum over local ranks.

    Args:
        facts: Facts of this machine or of any other.

    Returns:
        Findings in the order in which to read them.
    """
    return [*software(facts), *gpus(facts), *machine(facts), *collective(facts)]


def verdict(findings: Sequence[Finding]) -> str:
    """One line on all of them."""
    counts = {
        state: sum(f.state == state for f in findings) for state in ("fault", "warning", "ok")
    }
    parts = [
        f"{count} {name if count == 1 or name == 'ok' else f'{name}s'}"
        for name, count in counts.items()
        if count or name == "fault"
    ]
    return ", ".join(parts)
