"""Which rank counts as the first to fail, with a clock of the test's own."""

import pytest

from megatron_mimo.failfast.report import FailureReport, Kind
from megatron_mimo.failfast.verdict import CONSEQUENCE_SETTLE_S, SETTLE_S, Jury

SILENCE_S = 5.0


def jury_of(world_size: int) -> Jury:
    jury = Jury(world_size, SILENCE_S)
    for rank in range(world_size):
        jury.join(rank, f"role {rank}", f"host {rank}", now=0.0)
    return jury


def failure(rank: int, summary: str, kind: Kind = Kind.EXCEPTION) -> FailureReport:
    return FailureReport(
        kind=kind, rank=rank, role=f"role {rank}", host="host", summary=summary, seconds=0.0
    )


BOOM = "RuntimeError: boom"
CLOSED = "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:5559"


def test_nothing_is_decided_while_all_is_well() -> None:
    jury = jury_of(2)
    for second in range(1, 60):
        for rank in range(2):
            jury.beat(rank, now=float(second))
        assert jury.verdict(now=second + 0.5) is None


def test_absent_ranks_are_named() -> None:
    jury = Jury(4, SILENCE_S)
    jury.join(2, "llm", "host", now=0.0)
    assert not jury.complete
    assert jury.absent == (0, 1, 3)


def test_the_first_to_arrive_wins() -> None:
    jury = jury_of(3)
    jury.report(failure(2, BOOM), now=1.0)
    jury.report(failure(0, BOOM), now=1.1)
    assert jury.verdict(now=1.0 + SETTLE_S / 2) is None
    verdict = jury.verdict(now=1.0 + SETTLE_S)
    assert verdict is not None
    assert verdict.rank == 2


@pytest.mark.parametrize(
    "summary",
    [
        CLOSED,
        "RuntimeError: [pair.cc:537] Read error [127.0.0.1]:5559: Connection reset by peer",
        "torch.distributed.DistBackendError: NCCL error: remote process exited or there was a "
        "network error",
        "torch.distributed.DistNetworkError: failed to recv, got 0 bytes",
        "BrokenPipeError: [Errno 32] Broken pipe",
    ],
)
def test_a_lost_connection_waits_for_its_cause(summary: str) -> None:
    jury = jury_of(3)
    jury.report(failure(0, summary), now=1.0)
    assert jury.verdict(now=1.0 + SETTLE_S) is None
    jury.report(failure(2, "", Kind.DIED), now=1.5)
    verdict = jury.verdict(now=1.5 + SETTLE_S)
    assert verdict is not None
    assert (verdict.rank, verdict.kind) == (2, Kind.DIED)


def test_a_lost_connection_alone_is_shown_in_the_end() -> None:
    jury = jury_of(2)
    jury.report(failure(1, CLOSED), now=1.0)
    verdict = jury.verdict(now=1.0 + CONSEQUENCE_SETTLE_S)
    assert verdict is not None
    assert verdict.rank == 1


def test_a_silent_watcher_is_lost() -> None:
    jury = jury_of(3)
    for second in (3.0, 6.0):
        jury.beat(0, second)
        jury.beat(2, second)
        jury.verdict(second)
    verdict = jury.verdict(now=6.0 + SETTLE_S)
    assert verdict is not None
    assert (verdict.rank, verdict.role, verdict.host) == (1, "role 1", "host 1")
    assert "not heard for 5 s" in verdict.summary


def test_a_hub_that_stood_still_blames_nobody() -> None:
    jury = jury_of(2)
    jury.forgive(now=100.0)
    assert jury.verdict(now=100.0 + SILENCE_S) is None
    assert jury.verdict(now=100.0 + SILENCE_S + SETTLE_S) is None
    assert jury.verdict(now=100.0 + SILENCE_S + 2 * SETTLE_S) is not None


def test_who_has_left_or_failed_is_not_lost_as_well() -> None:
    jury = jury_of(2)
    jury.leave(1)
    jury.lost(1, now=1.0, how="closed its connection")
    jury.beat(0, now=100.0)
    assert jury.verdict(now=100.0) is None


def test_a_verdict_is_final() -> None:
    jury = jury_of(3)
    jury.report(failure(2, CLOSED), now=1.0)
    first = jury.verdict(now=1.0 + CONSEQUENCE_SETTLE_S)
    jury.lost(1, now=4.0, how="closed its connection")
    later = jury.verdict(now=5.0)
    assert first is not None
    assert later is not None
    assert first.rank == later.rank == 2
