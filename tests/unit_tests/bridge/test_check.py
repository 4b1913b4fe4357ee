"""Faults that both ends could not see without comparing."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_mimo.bridge.manifest import ManifestEntry


def exchange(fault: str) -> str | None:
    """Rank 0 sends 4 of its rows to rank 1 with one thing wrong; the error's text."""
    import torch
    import torch.distributed as dist

    from megatron_mimo.bridge.check import CheckConfig, CheckedChannel, View
    from megatron_mimo.bridge.plan import Message
    from megatron_mimo.bridge.transport import Incoming, Outgoing

    rank = dist.get_rank()
    control = dist.new_group(backend="gloo")
    channel = CheckedChannel(
        "rows",
        dist.group.WORLD,
        config=CheckConfig(
            control=control,
            tag=0,
            stride=4,
            receivers={1: 5} if rank == 0 else {},
            senders={0: 5} if rank == 1 else {},
            describe=lambda rank: ("encoder dp 0", "llm dp 5")[rank],
        ),
        rank=rank,
        width=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    key = "x" if fault == "key" and rank == 0 else "b"
    start = 9 if fault == "place" and rank == 0 else 1

    def view(m: int, lane: int, rows: int) -> View:
        return View(lane=lane, keys=("a", key), items=((0, 4, 0, start),), rows=rows)

    channel.begin(view)
    rows = torch.arange(8.0).view(4, 2)
    cut = 0 if fault == "silent" else 3 if fault == "rows" else 4
    if rank == 0:
        messages = (Message(1, ((0, cut),)),) if cut else ()
        channel.post(7, Outgoing(messages, rows), None)
        if fault == "memory":
            rows[2] = 0
        dist.barrier(control)
        # What rank 1 refuses to receive never leaves, so only the second barrier ends this.
        dist.barrier(control)
        return None
    pending = channel.post(7, None, Incoming((Message(0, ((0, 4),)),), 4))
    assert pending is not None
    # The sender has changed its rows by now, if it does.
    dist.barrier(control)
    try:
        got = pending.wait()
    except RuntimeError as error:
        return str(error)
    finally:
        dist.barrier(control)
    assert torch.equal(got, rows)
    pending.release()
    return None


SAID: dict[str, str | None] = {
    "none": None,
    "key": "receiver against sender: keys ('a', 'b') against ('a', 'x')",
    "place": "items ((0, 4, 0, 1),) against ((0, 4, 0, 9),)",
    "rows": "rows 4 against 3",
    "silent": "rows 4 against 0",
    "memory": "4 rows arrived with another checksum",
}


@pytest.mark.parametrize("fault", SAID)
def test_a_fault_is_named_with_both_sides_view(
    fault: str, run_ranks: Callable[..., list[Any]]
) -> None:
    _, message = run_ranks(2, exchange, fault)
    said = SAID[fault]
    if said is None:
        assert message is None
        return
    assert message is not None
    assert said in message
    where = "rows of microbatch 7 from rank 0 (encoder dp 0) to rank 1 (llm dp 5)"
    assert where in message


def test_an_end_that_does_not_know_a_lane_compares_rows_alone() -> None:
    from megatron_mimo.bridge.microbatch import MicrobatchManifest

    item = ManifestEntry(module="encoder", source_rank=1, lane=0, rows=3, sequence=0, start=2)
    knows = MicrobatchManifest(entries=(item,), keys={0: ("a",)})
    elsewhere = MicrobatchManifest(entries=(), keys={1: ("b",)})
    assert knows.view("encoder", 0, 0).agrees(elsewhere.view("encoder", 0, 0))
    assert elsewhere.view("encoder", 0, 0).agrees(knows.view("encoder", 0, 0))
    assert not elsewhere.view("encoder", 0, 0).agrees(knows.view("encoder", 0, 3))
    other = MicrobatchManifest(entries=(item,), keys={0: ("x",)})
    assert not knows.view("encoder", 0, 3).agrees(other.view("encoder", 0, 3))
