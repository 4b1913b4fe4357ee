"""All modules must read the same samples; disagreement is found before any row moves."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.topology import Layout, ModuleGridSpec

LAYOUT = Layout.of(
    ModuleGridSpec(name="encoder"),
    ModuleGridSpec(name="llm", offset=1, dp=2),
    world_size=3,
)
# Two encoder ranks share the sending to two lanes, which must know of each other.
SHARED = Layout.of(
    ModuleGridSpec(name="encoder", tp=2),
    ModuleGridSpec(name="llm", offset=2, dp=2),
    world_size=4,
)
# What a rank read of a lane: keys, and the rows of its images.
Reading = tuple[tuple[str, ...], tuple[ManifestEntry, ...]]


def entry(lane: int, rows: int, start: int, module: str = "encoder") -> ManifestEntry:
    return ManifestEntry(
        module=module, source_rank=0, lane=lane, rows=rows, sequence=0, start=start
    )


ROWS = {lane: (entry(lane, 3 + lane, 2),) for lane in range(2)}
KEYS = {0: ("a", "b"), 1: ("c", "d")}
SAME: dict[int, Reading] = {lane: (KEYS[lane], ROWS[lane]) for lane in range(2)}


def agree(
    layout: Layout,
    read: Mapping[int, Mapping[int, Reading]],
    tokens: int,
    validate: bool,
    starts: tuple[int, ...] = (),
    lengths: Mapping[int, tuple[int, ...]] | None = None,
) -> Any:
    """Run the agreement with what each rank read by lane; the error's text if it fails.

    With `starts` the samples of a lane share a sequence, in which they begin there; `lengths` are
    those of each rank's documents.
    """
    import hashlib

    import torch.distributed as dist

    from megatron_mimo.bridge.plan import BridgePlanner
    from megatron_mimo.data.loader.batch import Microbatch, StepData
    from megatron_mimo.topology import SequenceSharding
    from megatron_mimo.training.agreement import agree_on_step

    mine = read[dist.get_rank()]
    digests = {
        lane: int.from_bytes(hashlib.blake2b(repr(it).encode(), digest_size=7).digest())
        for lane, it in mine.items()
    }
    documents = {} if lengths is None else dict.fromkeys(mine, lengths[dist.get_rank()])
    if documents:
        digests = {
            lane: digest ^ hash(documents[lane]) & 0xFFFF for lane, digest in digests.items()
        }
    microbatch = Microbatch(
        index=0,
        manifest=tuple(entry for lane in sorted(mine) for entry in mine[lane][1]),
        keys={lane: keys for lane, (keys, _) in mine.items()},
        text=None,
        inputs={},
        starts={lane: tuple((0, start) for start in starts) for lane in mine if starts},
        documents=documents,
    )
    step = StepData(
        microbatches=(microbatch,),
        lane_digest=digests,
        lane_target_tokens=dict.fromkeys(mine, tokens),
        lane_positions={lane: 7 + lane for lane in mine if starts},
    )
    planners = {
        source.name: BridgePlanner(layout, source.name, SequenceSharding(seq_length=16))
        for source in layout.sources
    }
    try:
        agreement = agree_on_step(
            step, "iteration 7", layout, planners, dist.group.WORLD, validate=validate
        )
    except RuntimeError as error:
        return str(error)
    (manifest,) = agreement.manifests
    assert manifest.entries == microbatch.manifest
    assert manifest.documents == documents
    if starts:
        return agreement.positions
    assert agreement.positions is None
    return agreement.target_tokens, manifest.network_rows


def readers(encoder: Mapping[int, Reading], *lanes: Reading) -> dict[int, dict[int, Reading]]:
    """What ranks of `LAYOUT` read: the encoder's, then one for each lane."""
    return {0: dict(encoder), 1: {0: lanes[0]}, 2: {1: lanes[1]}}


def test_every_rank_learns_the_target_tokens_of_all_lanes(run_ranks: Callable[..., list]) -> None:
    read = readers(SAME, SAME[0], SAME[1])
    assert run_ranks(3, agree, LAYOUT, read, 5, True) == [(10, {})] * 3


def test_lanes_learn_of_each_others_rows_where_senders_share(
    run_ranks: Callable[..., list],
) -> None:
    read = {0: SAME, 1: SAME, 2: {0: SAME[0]}, 3: {1: SAME[1]}}
    assert (
        run_ranks(4, agree, SHARED, read, 5, True)
        == [(10, {"encoder": {(0, 0): 3, (0, 1): 4}})] * 4
    )
    bare = {0: SAME[0], 1: (KEYS[1], ())}
    read = {0: bare, 1: bare, 2: {0: bare[0]}, 3: {1: bare[1]}}
    assert (
        run_ranks(4, agree, SHARED, read, 5, True)
        == [(10, {"encoder": {(0, 0): 3, (0, 1): 0}})] * 4
    )


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            (("c", "x"), ROWS[1]),
            "sample 1: rank 0 (encoder dp 0) read 'd' with no rows, but rank 2 (llm dp 1) read 'x'",
        ),
        (
            (KEYS[1], (entry(1, 9, 2),)),
            "sample 0: rank 0 (encoder dp 0) read 'c' with 4 rows at 2 from encoder dp 0, but "
            "rank 2 (llm dp 1) read 'c' with 9 rows at 2 from encoder dp 0",
        ),
    ],
    ids=["key", "rows"],
)
def test_the_first_sample_that_differs_is_named_on_every_rank(
    other: Reading, said: str, run_ranks: Callable[..., list]
) -> None:
    for message in run_ranks(3, agree, LAYOUT, readers(SAME, SAME[0], other), 5, True):
        assert "iteration 7" in message
        assert "read other samples for lanes 1: lane 1, microbatch 0, " in message
        assert said in message


def test_documents_of_a_sequence_are_told_apart(run_ranks: Callable[..., list]) -> None:
    read = {lane: (KEYS[lane], (entry(lane, 4, 6),)) for lane in range(2)}
    same = readers(read, read[0], read[1])
    assert run_ranks(3, agree, LAYOUT, same, 5, True, (0, 5)) == [7 + 8] * 3
    other = (KEYS[1], (entry(1, 3, 6),))
    found = run_ranks(3, agree, LAYOUT, readers(read, read[0], other), 5, True, (0, 5))
    for message in found:
        assert (
            "lane 1, microbatch 0, sample 1: rank 0 (encoder dp 0) read 'd' at 5 with 4 rows at 6 "
            "from encoder dp 0, but rank 2 (llm dp 1) read 'd' at 5 with 3 rows at 6 from encoder "
            "dp 0"
        ) in message


def test_documents_of_other_lengths_are_told_apart(run_ranks: Callable[..., list]) -> None:
    """Rows would go to other ranks, where context parallelism cuts a sequence by its documents."""
    read = {lane: (KEYS[lane], (entry(lane, 4, 6),)) for lane in range(2)}
    lengths = {0: (5, 7, 4), 1: (5, 7, 4), 2: (5, 8, 3)}
    same = readers(read, read[0], read[1])
    alike = dict.fromkeys(range(3), lengths[0])
    assert run_ranks(3, agree, LAYOUT, same, 5, True, (0, 5), alike) == [7 + 8] * 3
    for message in run_ranks(3, agree, LAYOUT, same, 5, True, (0, 5), lengths):
        assert (
            "lane 1, microbatch 0, sample 1: rank 0 (encoder dp 0) read 'd' at 5, 7 tokens, with 4 "
            "rows at 6 from encoder dp 0, but rank 2 (llm dp 1) read 'd' at 5, 8 tokens, with 4"
        ) in message


def test_the_check_can_be_switched_off(run_ranks: Callable[..., list]) -> None:
    other = (("c", "x"), ROWS[1])
    read = readers(SAME, SAME[0], other)
    assert run_ranks(3, agree, LAYOUT, read, 5, False) == [(10, {})] * 3


def test_a_batch_without_targets_is_an_error(run_ranks: Callable[..., list]) -> None:
    for message in run_ranks(3, agree, LAYOUT, readers(SAME, SAME[0], SAME[1]), 0, True):
        assert "no target token in the global batch" in message


# Of the two sources only audio has several ranks that share the sending to both lanes.
TWO = Layout.of(
    ModuleGridSpec(name="encoder"),
    ModuleGridSpec(name="audio", offset=1, tp=2),
    ModuleGridSpec(name="llm", offset=3, dp=2),
    world_size=5,
)


def test_each_source_counts_for_itself(run_ranks: Callable[..., list]) -> None:
    both = {
        lane: (KEYS[lane], (*ROWS[lane], entry(lane, 5, 8, module="audio"))) for lane in range(2)
    }
    read = {0: both, 1: both, 2: both, 3: {0: both[0]}, 4: {1: both[1]}}
    assert run_ranks(5, agree, TWO, read, 5, True) == [(10, {"audio": {(0, 0): 5, (0, 1): 5}})] * 5
    other = (KEYS[1], (*ROWS[1], entry(1, 6, 8, module="audio")))
    for message in run_ranks(5, agree, TWO, read | {4: {1: other}}, 5, True):
        assert "4 rows at 2 from encoder dp 0, 5 rows at 8 from audio dp 0, but rank 4" in message
