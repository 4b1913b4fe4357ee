"""Numbers of a log interval, by construction."""

from typing import Any

import pytest

from megatron_mimo.data.loader.batch import ModuleDispatch
from megatron_mimo.model.flops import ModelFlops, ModelWork
from megatron_mimo.modules.flops import Flops, TextWork
from megatron_mimo.modules.radio.flops import ImageWork
from megatron_mimo.schedule.actions import Action, Kind
from megatron_mimo.schedule.laps import Lap, Phase
from megatron_mimo.topology import Layout
from megatron_mimo.watch.rank_report import (
    Part,
    RankReport,
    Share,
    max_over_mean,
    rank_report,
    run_scalars,
    slot_of,
    slots_of,
)
from megatron_mimo.watch.usage import StepUsage
from tests.unit_tests.schedule.toy import grids, modules

ENCODER, LLM = "encoder", "llm"
# Encoder stages on ranks 0 and 1, language stages on 2 and 3.
PIPELINES = grids({"pp": 2}, {"pp": 2})


def action(kind: Kind, module: str) -> Action:
    return Action(kind, module, 0)


@pytest.mark.parametrize(
    ("rank", "kind", "module", "part"),
    [
        (0, Kind.FORWARD, ENCODER, Part.COMPUTE),
        (0, Kind.WAIT_GRAD, ENCODER, Part.PIPELINE),
        (1, Kind.WAIT_INPUT, ENCODER, Part.PIPELINE),
        (1, Kind.SEND_GRAD, ENCODER, Part.PIPELINE),
        (1, Kind.SEND_OUTPUT, ENCODER, Part.BRIDGE),
        (1, Kind.POST_GRAD, ENCODER, Part.BRIDGE),
        (1, Kind.WAIT_GRAD, ENCODER, Part.BRIDGE),
        (1, Kind.WAIT_SENT, ENCODER, Part.BRIDGE),
        (2, Kind.POST_INPUT, LLM, Part.BRIDGE),
        (2, Kind.WAIT_INPUT, LLM, Part.BRIDGE),
        (2, Kind.SEND_GRAD, LLM, Part.BRIDGE),
        (2, Kind.WAIT_GRAD, LLM, Part.PIPELINE),
        (3, Kind.WAIT_INPUT, LLM, Part.PIPELINE),
        (3, Kind.BACKWARD, LLM, Part.COMPUTE),
    ],
)
def test_only_the_ends_of_the_bridge_wait_at_it(
    rank: int, kind: Kind, module: str, part: Part
) -> None:
    assert slot_of(action(kind, module), PIPELINES, rank) == (module, part)


def test_every_phase_counts_for_the_rank() -> None:
    parts = {phase: slot_of(phase, PIPELINES, 0) for phase in Phase}
    assert parts[Phase.DATA] == (None, Part.DATA)
    assert parts[Phase.OPTIMIZER] == (None, Part.OPTIMIZER)
    assert parts[Phase.GRADIENTS] == (None, Part.GRADIENTS)
    assert parts[Phase.DRAIN] == (None, Part.OTHER)
    assert set(parts.values()) <= set(slots_of(PIPELINES))


def test_a_rank_sums_its_interval_up() -> None:
    laps = [
        Lap(1, Phase.DATA, 0.0, 0.5),
        Lap(1, action(Kind.FORWARD, ENCODER), 0.5, 2.5),
        Lap(1, action(Kind.WAIT_GRAD, ENCODER), 2.5, 3.0),
        Lap(2, action(Kind.FORWARD, ENCODER), 5.0, 6.0),
        Lap(2, action(Kind.BACKWARD, ENCODER), 6.0, 6.25),
    ]
    usages = [
        StepUsage(ModelWork({ENCODER: ImageWork(rows=2, patches=8), LLM: TextWork()}), 10),
        StepUsage(ModelWork({ENCODER: ImageWork(rows=1, patches=4), LLM: TextWork()}), 5),
    ]
    report = rank_report(laps, usages, grids({}, {}), 0, skipped=3, peak_memory=2**40 + 1)
    spent = {slot: seconds for slot, seconds in report.seconds.items() if seconds}
    assert spent == {
        (ENCODER, Part.COMPUTE): 3.25,
        (ENCODER, Part.BRIDGE): 0.5,
        (None, Part.DATA): 0.5,
    }
    assert sum(spent.values()) == sum(lap.seconds for lap in laps)
    assert report.work.modules[ENCODER] == ImageWork(rows=3, patches=12)
    assert report.bytes_sent == 15
    assert report.counts == {(ENCODER, "rows"): (2, 1), (ENCODER, "patches"): (8, 4)}
    empty = rank_report([], usages[:1] * 2, grids({}, {}), 1, skipped=0, peak_memory=0)
    assert empty.read(report.to_numbers()) == report


def test_a_rank_tells_how_its_items_were_shared_out() -> None:
    works = ModelWork({ENCODER: ImageWork(), LLM: TextWork()})
    module = ModuleDispatch(by_lane=(7, 0), as_run=(4, 1), largest=(3, 1), received=5)
    usages = [
        StepUsage(works, 0, 2, {ENCODER: module}, ((0.0, 0.5), (0.9, 1.3))),
        StepUsage(works, 0, 2, {ENCODER: module}, ((1.8, 2.0),)),
    ]
    laps = [
        Lap(1, Phase.DATA, 1.0, 1.25),
        Lap(1, action(Kind.FORWARD, ENCODER), 1.25, 1.9),
        Lap(2, Phase.DATA, 1.9, 2.5),
    ]
    layout = grids({"dp": 2}, {})
    report = rank_report(laps, usages, layout, 0, skipped=0, peak_memory=0)
    assert report.shares == {
        (ENCODER, Share.BY_LANE): (7, 0, 7, 0),
        (ENCODER, Share.AS_RUN): (4, 1, 4, 1),
        (ENCODER, Share.LARGEST): (3, 1, 3, 1),
    }
    assert report.received == {ENCODER: 10}
    assert report.exchange == pytest.approx(1.1)
    # From 1 to 1.25 and from 1.9 to 2 the step waited for what was exchanged.
    assert report.exposed == pytest.approx(0.35)
    # A rank of another module has as many numbers.
    nothing = [StepUsage(works, 0, 2)] * 2
    empty = rank_report([], nothing, layout, 2, skipped=0, peak_memory=0)
    assert set(empty.shares.values()) == {(0, 0, 0, 0)}
    assert empty.read(report.to_numbers()) == report


def report(layout: Layout, **fields: Any) -> RankReport:
    """Two steps without anything, but for the fields given and the times by slot."""
    times = fields.pop("times", {})
    work = {source.name: ImageWork() for source in layout.sources} | {LLM: TextWork()}
    counts = {
        (source.name, count): (0, 0) for source in layout.sources for count in ImageWork.balanced
    }
    several = [source.name for source in layout.sources if source.dp > 1]
    shares = {(name, share): (0, 0) for name in several for share in Share}
    return RankReport(
        shares=shares | fields.pop("shares", {}),
        received=dict.fromkeys(several, 0) | fields.pop("received", {}),
        seconds=dict.fromkeys(slots_of(layout), 0.0) | times,
        work=ModelWork(work | fields.pop("work", {})),
        bytes_sent=fields.pop("bytes_sent", 0),
        skipped=fields.pop("skipped", 0),
        peak_memory=fields.pop("peak_memory", 0),
        counts=counts | fields.pop("counts", {}),
        **fields,
    )


def scalars(
    layout: Layout, reports: list[RankReport], peak: float | None = None
) -> dict[str, float]:
    def flops(work: ModelWork) -> ModelFlops:
        """A row costs 3 TFLOP with its backward, a sequence 5."""
        return ModelFlops(
            {
                name: Flops(2 * 10**12 * of.rows, 10**12 * of.rows)
                if name != LLM
                else Flops(0, 5 * 10**12 * of.sequences)  # type: ignore[attr-defined]
                for name, of in work.modules.items()
            }
        )

    return run_scalars(
        reports,
        layout,
        flops,
        steps=2,
        seconds_per_step=2.0,
        tokens_per_step=600,
        peak_tflops=peak,
    )


def test_a_run_in_numbers() -> None:
    """Two encoder ranks and a lane; two steps of 2 s."""
    layout = grids({"dp": 2}, {})
    found = scalars(
        layout,
        [
            report(
                layout,
                times={(ENCODER, Part.COMPUTE): 1.0, (None, Part.DATA): 0.5},
                work={ENCODER: ImageWork(rows=12, patches=48)},
                counts={(ENCODER, "rows"): (6, 6), (ENCODER, "patches"): (24, 24)},
                bytes_sent=100,
                peak_memory=2**30,
            ),
            report(
                layout,
                times={(ENCODER, Part.COMPUTE): 2.0, (ENCODER, Part.BRIDGE): 1.0},
                work={ENCODER: ImageWork(rows=8, patches=24)},
                counts={(ENCODER, "rows"): (2, 6), (ENCODER, "patches"): (24, 0)},
                bytes_sent=60,
                peak_memory=3 * 2**30,
            ),
            report(
                layout,
                times={(LLM, Part.COMPUTE): 3.0, (None, Part.OPTIMIZER): 0.25},
                work={LLM: TextWork(sequences=4)},
                bytes_sent=40,
                skipped=7,
                peak_memory=2**29,
            ),
        ],
        peak=10.0,
    )
    times = {
        tag.removeprefix("time/"): ms for tag, ms in found.items() if tag[:5] == "time/" and ms
    }
    assert times == {
        "encoder compute ms": 750.0,
        "encoder bridge ms": 250.0,
        "encoder data ms": 125.0,
        "llm compute ms": 1500.0,
        "llm optimizer ms": 125.0,
    }
    others = {tag: value for tag, value in found.items() if tag[:5] != "time/"}
    assert others == pytest.approx(
        {
            # 6 of 8, then 6 of 12, over two ranks: 1.5 and 1.
            "balance/encoder rows max over mean": 1.25,
            "balance/encoder patches max over mean": 1.5,
            "bridge/rows": 10,
            "bridge/bytes": 100,
            "speed/tokens per s": 300,
            "speed/tokens per s per GPU": 100,
            # 20 rows of 3 TFLOP and 4 sequences of 5, in two steps of 2 s.
            "speed/encoder TFLOP per s per GPU": 7.5,
            "speed/llm TFLOP per s per GPU": 5,
            "speed/model TFLOP per s per GPU": 20 / 3,
            "speed/encoder MFU": 0.75,
            "speed/llm MFU": 0.5,
            "speed/model MFU": 2 / 3,
            "data/skipped samples": 7,
            "memory/encoder peak GiB": 3,
            "memory/llm peak GiB": 0.5,
        }
    )


def test_balance_is_that_of_operations_where_items_are_shared_out() -> None:
    layout = grids({"dp": 2}, {})
    shares = (
        {Share.BY_LANE: (8, 0), Share.AS_RUN: (5, 0), Share.LARGEST: (2, 0)},
        {Share.BY_LANE: (0, 6), Share.AS_RUN: (3, 6), Share.LARGEST: (3, 6)},
    )
    reports = [
        report(
            layout,
            shares={(ENCODER, share): numbers for share, numbers in of_rank.items()},
            received={ENCODER: 12 * rank},
            exchange=0.5 + rank,
            exposed=0.25 * rank,
        )
        for rank, of_rank in enumerate(shares)
    ]
    found = scalars(layout, [*reports, report(layout)])
    # Microbatches of 8 and of 6 operations: 4 and 3 for the mean rank.
    assert {tag: value for tag, value in found.items() if tag.startswith("dispatch/")} == {
        "dispatch/encoder by lane max over mean": 14 / 7,
        "dispatch/encoder as run max over mean": 11 / 7,
        # The second microbatch is one item.
        "dispatch/encoder least max over mean": 10 / 7,
        "dispatch/encoder bytes": 6,
        "dispatch/exchange ms": 750,
        "dispatch/exchange exposed ms": 125,
    }


def test_the_language_model_alone_has_no_encoder_and_no_bridge() -> None:
    layout = grids(None, {"dp": 2})
    one = report(layout, work={LLM: TextWork(sequences=1)})
    found = scalars(layout, [one, report(layout)])
    assert not [tag for tag in found if "encoder" in tag or "bridge/" in tag or "MFU" in tag]
    assert found["speed/model TFLOP per s per GPU"] == found["speed/llm TFLOP per s per GPU"]


def test_colocated_modules_share_the_ranks_time() -> None:
    """Each module has its own computing, and both have the optimizer."""
    times = {(ENCODER, Part.COMPUTE): 1.0, (LLM, Part.COMPUTE): 3.0, (None, Part.OPTIMIZER): 2.0}
    layout = grids({}, {}, colocated=True)
    found = scalars(layout, [report(layout, times=times)])
    assert found["time/encoder compute ms"] == 500
    assert found["time/llm compute ms"] == 1500
    assert found["time/encoder optimizer ms"] == found["time/llm optimizer ms"] == 1000


def test_each_source_is_counted_by_its_name() -> None:
    layout = modules(vision={}, audio={"offset": 1}, llm={"offset": 2})
    rows = {"vision": (4, 2), "audio": (1, 1)}
    reports = [
        report(
            layout,
            work={name: ImageWork(rows=sum(of_steps))},
            counts={(name, "rows"): of_steps},
        )
        for name, of_steps in rows.items()
    ]
    found = scalars(layout, [*reports, report(layout)])
    assert (found["bridge/rows"], found["bridge/vision rows"], found["bridge/audio rows"]) == (
        4,
        3,
        1,
    )
    # 3 TFLOP for a row, over two steps of two seconds.
    assert found["speed/vision TFLOP per s per GPU"] == 4.5
    assert found["speed/audio TFLOP per s per GPU"] == 1.5
    assert found["balance/audio rows max over mean"] == 1
    assert "time/audio bridge ms" in found


def test_imbalance_is_a_mean_over_steps_with_images() -> None:
    assert max_over_mean([[3, 0, 2], [1, 0, 2]]) == 1.25
    assert max_over_mean([[0, 0], [0, 0]]) is None
    assert max_over_mean([[5, 1]]) == 1
