"""The hub among strangers, and among watchers that send what no watcher sends."""

import json
import resource
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.failfast import door
from megatron_mimo.failfast.door import WAITING, Visit
from megatron_mimo.failfast.greeting import LIMIT_S
from megatron_mimo.failfast.hub import Hub
from megatron_mimo.failfast.report import FailureReport, Kind
from megatron_mimo.failfast.wire import LONGEST, Link
from tests.properties import examples

SECRET = "0123456789abcdef"


class Place:
    """A hub in this process, and its loop."""

    def __init__(self, world_size: int, address: str = "127.0.0.1") -> None:
        self.selector = selectors.DefaultSelector()
        self.world_size = world_size
        self.hub = Hub(
            self.selector, world_size, 5.0, address=address, secret=SECRET, role="encoder"
        )
        self.refused: list[str] = []

    def turn(self, times: int = 1, *, later_s: float = 0.0) -> None:
        """Run the loop until nothing happens in it, then let it check the time."""
        for _ in range(times):
            while events := self.selector.select(0.02):
                for key, _ in events:
                    key.data()
            self.hub.tick(time.monotonic() + later_s)

    def stranger(self) -> socket.socket:
        return socket.create_connection(self.hub.address, timeout=10)

    def watcher(self, rank: int, *, joins: bool = True, secret: str = SECRET) -> Link | None:
        """The link of a watcher that the hub has welcomed; None if it has not."""
        found: list[Link] = []
        visit = Visit(
            self.selector,
            self.hub.address,
            secret=secret,
            rank=rank,
            world_size=self.world_size,
            welcomed=found.append,
            refused=self.refused.append,
        )
        visit.tick(time.monotonic())
        self.turn()
        if not found:
            return None
        if joins:
            found[0].send(kind="join", role=f"llm dp {rank}", host="node7")
            self.turn()
        return found[0]

    def verdict(self) -> FailureReport | None:
        """What the hub decides, at once."""
        self.hub.decide()
        deadline = time.monotonic() + 0.4
        while self.hub.verdict is None and time.monotonic() < deadline:
            time.sleep(0.05)
            self.hub.decide()
        return self.hub.verdict


@contextmanager
def place(world_size: int, address: str = "127.0.0.1") -> Iterator[Place]:
    made = Place(world_size, address)
    try:
        yield made
    finally:
        made.hub.close()
        made.selector.close()


def is_closed(connection: socket.socket) -> bool:
    """Whether the hub has closed it, with or without a word before."""
    with suppress(ConnectionError):
        while True:
            try:
                if not connection.recv(1000):
                    return True
            except TimeoutError:
                return False
    return True


@pytest.mark.parametrize(
    "greeting",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"kind": "hello", "token": "guess", "rank": 0}\n',
        b"[" * 5000 + b"\n",
        b"\x16\x03\x01" + b"\x00" * 1000,
        b"",
    ],
)
def test_strangers_are_turned_away(greeting: bytes) -> None:
    with place(2) as here, here.stranger() as stranger:
        stranger.sendall(greeting)
        stranger.shutdown(socket.SHUT_WR)
        here.turn(2)
        assert is_closed(stranger)
        assert here.hub.absent == (0, 1)
        assert here.watcher(1) is not None
        assert here.hub.absent == (0,)


def test_of_many_idle_connections_the_oldest_are_closed() -> None:
    with place(2) as here:
        held = []
        for _ in range(WAITING + 20):
            held.append(here.stranger())
            here.turn()
        for stranger in held:
            stranger.settimeout(0.0)
        gone = [_was_hung_up(stranger) for stranger in held]
        assert gone == [True] * 20 + [False] * WAITING
        assert here.watcher(0) is not None
        assert here.watcher(1) is not None
        for stranger in held:
            stranger.close()


def _was_hung_up(stranger: socket.socket) -> bool:
    try:
        while stranger.recv(1000):
            pass
    except BlockingIOError:
        return False
    return True


def test_an_idle_connection_is_closed_in_time() -> None:
    with place(2) as here, here.stranger() as stranger:
        stranger.settimeout(0.1)
        here.turn()
        assert not is_closed(stranger)
        here.turn(later_s=LIMIT_S + 1)
        assert is_closed(stranger)


def test_strangers_that_use_up_the_open_files_do_not_stop_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door, "WAITING", 10_000)
    with place(2) as here:
        held = [here.stranger() for _ in range(20)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as probe:
            resource.setrlimit(resource.RLIMIT_NOFILE, (probe.fileno() + 5, hard))
        try:
            here.turn(30)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for stranger in held:
            stranger.close()
        here.turn()
        assert here.watcher(0) is not None


def test_the_hub_listens_only_where_it_is_told_and_only_until_all_have_joined() -> None:
    with place(2) as here:
        names = {key.fileobj.getsockname()[0] for key in here.selector.get_map().values()}  # type: ignore[union-attr]
        assert names == {"127.0.0.1"}
        stranger = here.stranger()
        here.turn()
        first, second = here.watcher(0), here.watcher(1)
        assert first is not None and second is not None
        with pytest.raises(ConnectionRefusedError):
            here.stranger()
        assert is_closed(stranger)
        stranger.close()
        assert (first.receive_first(5.0) or {})["kind"] == "welcome"
        assert (second.receive_first(5.0) or {})["kind"] == "welcome"


def test_an_address_that_is_not_of_this_machine_is_no_obstacle() -> None:
    with place(1, "203.0.113.7") as here:
        assert here.watcher(0) is not None


def test_a_rank_cannot_take_anothers_place() -> None:
    with place(3) as here:
        first = here.watcher(1)
        assert here.watcher(1) is None
        assert here.refused == ["the hub refused it: the rank is taken"]
        assert first is not None
        first.send(kind="bye")
        here.turn()
        assert here.watcher(1) is None  # not even when it has left
        assert here.verdict() is None


def test_a_watcher_with_another_secret_is_told() -> None:
    with place(2) as here:
        assert here.watcher(0, secret="f" * 16) is None
        assert here.refused == ["the hub refused it: another secret"]
        assert here.hub.absent == (0, 1)


def _report(**changes: Any) -> dict[str, Any]:
    report = FailureReport(
        kind=Kind.EXCEPTION, rank=1, role="llm", host="node7", summary="boom", seconds=1e9
    )
    return report.to_json() | changes


@pytest.mark.parametrize(
    "message",
    [
        b"[" * 5000,
        b"[]",
        b"{}",
        b'{"kind": 3}',
        b'{"kind": "dance"}',
        b'{"kind": "join", "role": "llm", "host": "node7"}',
        b'{"kind": "failed"}',
        b'{"kind": "failed", "report": []}',
        json.dumps({"kind": "failed", "report": _report(rank=0)}).encode(),
        json.dumps({"kind": "failed", "report": _report(rank="1")}).encode(),
        json.dumps({"kind": "failed", "report": _report(kind=["died"])}).encode(),
        json.dumps({"kind": "failed", "report": _report(seconds=float("nan"))}).encode(),
        json.dumps({"kind": "failed", "report": _report(summary=None)}).encode(),
        json.dumps({"kind": "failed", "report": _report(traceback="x" * LONGEST)}).encode(),
        json.dumps({"kind": "failed", "report": _report(more=1)}).encode(),
    ],
)
def test_what_no_watcher_sends_counts_as_its_loss(message: bytes) -> None:
    with place(2) as here:
        watcher, other = here.watcher(1), here.watcher(0)
        assert watcher is not None and other is not None
        watcher._socket.sendall(message + b"\n")
        here.turn()
        verdict = here.verdict()
        assert verdict is not None
        assert (verdict.rank, verdict.kind) == (1, Kind.SILENT)
        assert "its watcher sent something that no watcher sends" in verdict.summary


def test_a_report_whose_every_character_is_escaped_arrives() -> None:
    with place(2) as here:
        watcher, other = here.watcher(1), here.watcher(0)
        assert watcher is not None and other is not None
        report = FailureReport(
            kind=Kind.EXCEPTION,
            rank=1,
            role="\N{OX}" * 1000,
            host="node7",
            summary="\N{OX}" * 100_000,
            traceback="\N{OX}" * 100_000 + "\ud800",
            seconds=1e9,
        )
        assert len(json.dumps({"kind": "failed", "report": report.to_json()})) < LONGEST
        watcher.send(kind="failed", report=report.to_json())
        here.turn(5)
        verdict = here.verdict()
        assert verdict is not None
        assert verdict.kind is Kind.EXCEPTION


def test_a_watcher_that_never_joins_leaves_no_trace() -> None:
    with place(2) as here:
        watcher = here.watcher(1, joins=False)
        assert watcher is not None
        watcher._socket.sendall(b"nonsense\n")
        here.turn()
        assert here.hub.absent == (0, 1)
        assert here.verdict() is None
        assert here.watcher(1) is not None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
KINDS = st.sampled_from(["join", "beat", "failed", "bye", "verdict", "welcome"])
MESSAGES = st.one_of(
    st.binary(max_size=200),
    st.fixed_dictionaries(
        {"kind": KINDS}, optional={"report": VALUES, "role": VALUES, "host": VALUES}
    ).map(lambda message: json.dumps(message).encode()),
    st.dictionaries(st.sampled_from(list(_report())), VALUES).map(
        lambda report: json.dumps({"kind": "failed", "report": _report(**report)}).encode()
    ),
)


@examples(100)
@given(st.lists(MESSAGES, max_size=5), st.booleans())
def test_no_stream_ends_a_link_with_an_error(pieces: list[bytes], ends_lines: bool) -> None:
    ours, theirs = socket.socketpair()
    ours.sendall((b"\n" if ends_lines else b"").join(pieces) + b"\n")
    ours.close()
    link = Link(theirs)
    for _ in range(100):
        messages = link.receive()
        if messages is None:
            break
        assert all(isinstance(message["kind"], str) for message in messages)
    assert messages is None
    link.close()


@examples(100)
@given(VALUES, st.dictionaries(st.sampled_from(list(_report())), VALUES))
def test_a_report_is_read_or_refused(anything: Any, changes: dict[str, Any]) -> None:
    for values in (anything, _report(**changes)):
        try:
            report = FailureReport.from_json(values)
        except ValueError:
            continue
        assert FailureReport.from_json(report.to_json()) == report


@examples(10)
@given(st.lists(MESSAGES, min_size=1, max_size=5))
def test_garbage_of_a_watcher_is_never_another_ranks_failure(pieces: list[bytes]) -> None:
    with place(2) as here:
        watcher, other = here.watcher(1), here.watcher(0)
        assert watcher is not None and other is not None
        for piece in pieces:
            with suppress(OSError):
                watcher._socket.sendall(piece + b"\n")
        here.turn()
        here.hub.decide()
        verdict = here.verdict() if here.hub.verdict is None else here.hub.verdict
        assert verdict is None or verdict.rank == 1
        assert here.hub.others(1) == 1
