"""How watcher and hub make sure of each other: what a stranger sends is never taken for either."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.failfast.greeting import (
    LONGEST,
    Guest,
    HubGreeting,
    Refused,
    WatcherGreeting,
    refusal,
)
from tests.properties import examples

SECRET = "0123456789abcdef"


def test_both_become_sure_of_each_other() -> None:
    hub, watcher = HubGreeting(SECRET, 4), WatcherGreeting(SECRET, 3, 4)
    guest = hub.take(watcher.take(hub.challenge))
    assert guest is not None
    assert guest.rank == 3
    assert not watcher.welcomed
    assert watcher.take(guest.welcome + b'{"kind": "beat"}\n') == b""
    assert watcher.welcomed
    assert watcher.rest == b'{"kind": "beat"}\n'


def test_bytes_may_come_one_by_one() -> None:
    hub, watcher = HubGreeting(SECRET, 4), WatcherGreeting(SECRET, 0, 4)
    answer = b"".join(watcher.take(bytes([byte])) for byte in hub.challenge)
    guests = [hub.take(bytes([byte])) for byte in answer]
    assert guests[:-1] == [None] * (len(answer) - 1)
    assert isinstance(guests[-1], Guest)


@pytest.mark.parametrize(
    ("watcher", "reason"),
    [
        (WatcherGreeting("fedcba9876543210", 3, 4), "another secret"),
        (WatcherGreeting(SECRET, 3, 5), "another secret"),  # of another run
        (WatcherGreeting(SECRET, 4, 4), "no such rank"),
    ],
)
def test_a_watcher_of_another_run_is_refused_and_told_why(
    watcher: WatcherGreeting, reason: str
) -> None:
    hub = HubGreeting(SECRET, 4)
    with pytest.raises(Refused, match=reason):
        hub.take(watcher.take(hub.challenge))
    with pytest.raises(Refused, match=f"the hub refused it: {reason}"):
        watcher.take(refusal(reason))


def test_what_was_overheard_proves_nothing_elsewhere() -> None:
    overheard = WatcherGreeting(SECRET, 3, 4).take(HubGreeting(SECRET, 4).challenge)
    with pytest.raises(Refused, match="another secret"):
        HubGreeting(SECRET, 4).take(overheard)


def test_a_rank_cannot_be_changed_on_the_way() -> None:
    hub = HubGreeting(SECRET, 4)
    answer = WatcherGreeting(SECRET, 3, 4).take(hub.challenge)
    with pytest.raises(Refused, match="another secret"):
        hub.take(b"2" + answer[1:])


def test_a_stranger_is_not_taken_for_the_hub() -> None:
    for answer in (b"HTTP/1.1 400 Bad Request\n", b"welcome " + b"0" * 64 + b"\n"):
        with pytest.raises(Refused, match="what listens there is not the hub"):
            WatcherGreeting(SECRET, 3, 4).take(answer)
    watcher = WatcherGreeting(SECRET, 3, 4)
    watcher.take(HubGreeting("fedcba9876543210", 4).challenge)
    with pytest.raises(Refused, match="does not know the secret"):
        watcher.take(b"welcome " + b"0" * 64 + b"\n")


def test_a_line_has_an_end() -> None:
    hub = HubGreeting(SECRET, 4)
    assert hub.take(b"[" * LONGEST) is None
    with pytest.raises(Refused, match="not a watcher"):
        hub.take(b"[")


def test_a_watcher_waits_for_its_welcome() -> None:
    hub = HubGreeting(SECRET, 4)
    answer = WatcherGreeting(SECRET, 3, 4).take(hub.challenge)
    with pytest.raises(Refused, match="not a watcher"):
        hub.take(answer + b'{"kind": "join"}\n')


PIECES = st.one_of(
    st.binary(max_size=300),
    st.sampled_from([b"\n", b"[" * 200, b'{"kind": "hello"}', b"0 ", b"3 " + b"a" * 32 + b" "]),
    st.text("0123456789abcdef \n", max_size=100).map(str.encode),
)


@examples(100)
@given(st.lists(PIECES, max_size=6))
def test_a_stranger_is_never_taken_for_a_watcher(pieces: list[bytes]) -> None:
    hub = HubGreeting(SECRET, 4)
    try:
        assert [hub.take(piece) for piece in pieces] == [None] * len(pieces)
    except Refused:
        pass


@examples(100)
@given(st.lists(PIECES, max_size=6), st.booleans())
def test_a_stranger_is_never_taken_for_the_hub_whatever_it_says(
    pieces: list[bytes], after_a_challenge: bool
) -> None:
    watcher = WatcherGreeting(SECRET, 3, 4)
    if after_a_challenge:
        watcher.take(HubGreeting(SECRET, 4).challenge)
    try:
        for piece in pieces:
            watcher.take(piece)
    except Refused:
        pass
    assert not watcher.welcomed


@examples(100)
@given(st.data())
def test_one_changed_byte_is_refused(data: st.DataObject) -> None:
    hub = HubGreeting(SECRET, 4)
    answer = bytearray(WatcherGreeting(SECRET, 3, 4).take(hub.challenge))
    where = data.draw(st.integers(0, len(answer) - 2))
    answer[where] = data.draw(st.integers(0, 255).filter(lambda byte: byte != answer[where]))
    with pytest.raises(Refused):
        hub.take(bytes(answer))
