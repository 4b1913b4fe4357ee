import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megatron_mimo.training.leaving import SIGNALS, Leave, LeaveRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nobody_leaves_unasked() -> None:
    request = LeaveRequest()
    request.watch_signals()
    assert request.wish() is Leave.NOT


def test_time_is_up_after_some_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    request = LeaveRequest(2)
    now += 119
    assert request.wish() is Leave.NOT
    now += 1
    assert request.wish() is Leave.TIME
    assert request.explain(Leave.TIME) == "exiting program after 2 minutes"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted(number: signal.Signals) -> None:
    request = LeaveRequest()
    request.watch_signals()
    os.kill(os.getpid(), number)
    assert request.wish() is Leave[number.name]
    assert request.explain(request.wish()) == f"exiting program after receiving {number.name}"
    assert all(signal.getsignal(each) is signal.SIG_DFL for each in SIGNALS)


_TWICE = """
import os, signal, sys
from megatron_mimo.training.leaving import LeaveRequest
LeaveRequest().watch_signals()
os.kill(os.getpid(), signal.SIGUSR1)
print("still here", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("too late", flush=True)
"""


def test_a_second_signal_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _TWICE], capture_output=True, text=True, check=False
    )
    assert done.stdout == "still here\n"
    assert done.returncode == -signal.SIGTERM
