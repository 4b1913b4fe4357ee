"""Ranks that read share out items, move contents, and leave together."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.loader.announcement import (
    Announcement,
    Kind,
    KnownItem,
    Table,
    read_items,
    report_items,
)
from megatron_mimo.data.loader.component import Component, components
from megatron_mimo.data.loader.drawn import ItemPlace
from megatron_mimo.data.role import data_role
from megatron_mimo.topology import Layout, ModuleGridSpec, balanced

CONFIG = DataConfig(global_batch_size=12, micro_batch_size=2, text_only_fraction=0.3)


def layout(encoder: dict[str, int], llm: dict[str, int], size: int | None = None) -> Layout:
    first = ModuleGridSpec(name="encoder", **encoder)
    second = ModuleGridSpec(name="llm", **({"offset": first.size} | llm))
    world_size = max(first.ranks.stop, second.ranks.stop)
    return balanced(Layout.of(first, second, world_size=world_size), size)


def components_of(of: Layout) -> tuple[Component, ...]:
    return components(of, [data_role(of, rank) for rank in range(of.world_size)])


def test_ranks_that_read_decide_together_domain_by_domain() -> None:
    (whole,) = components_of(layout({"dp": 2, "tp": 2}, {"dp": 4}))
    assert whole.lanes == (0, 1, 2, 3)
    assert whole.readers == (0, 2, 4, 5, 6, 7)
    assert whole.movers == (0, 2)
    assert whole.homes == {
        ("encoder", 0): (0,),
        ("encoder", 1): (0,),
        ("encoder", 2): (1,),
        ("encoder", 3): (1,),
    }
    first, second = components_of(layout({"dp": 4}, {"dp": 4}, 2))
    assert (first.readers, second.readers) == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert (first.lanes, second.lanes) == ((0, 1), (2, 3))


def test_where_every_replica_reads_a_lane_all_are_its_homes() -> None:
    (component,) = components_of(layout({"dp": 3}, {"dp": 1}))
    assert component.homes == {("encoder", 0): (0, 1, 2)}
    # A rank that holds both modules reads its own lane too.
    (component,) = components_of(layout({"dp": 2}, {"offset": 0, "tp": 2}))
    assert component.homes == {("encoder", 0): (0, 1)}


def test_each_reader_of_a_replica_gets_what_it_has_not_read() -> None:
    # Two ranks of a replica of the encoder read for lanes of their own.
    (component,) = components_of(layout({"dp": 2, "tp": 2}, {"offset": 0, "dp": 4}))
    assert component.readers_of == {("encoder", 0): (0, 1), ("encoder", 1): (2, 3)}


def test_a_layout_without_domains_has_no_component() -> None:
    of = layout({"dp": 1}, {"dp": 2})
    assert not of.domains
    assert components_of(of) == ()


def test_a_report_is_read_as_it_was_written() -> None:
    items = [
        KnownItem(ItemPlace(0, 3, 1, ((4, 2), (9, 1))), 10**15, 128),
        KnownItem(ItemPlace(2, 3, 0, ((0, 7),)), 1, 64),
    ]
    assert read_items(report_items("encoder", 3, items)) == items
    assert read_items(report_items("encoder", 3, [])) == []


def test_items_of_a_table_are_by_microbatch_then_lane() -> None:
    def told(lane: int) -> Announcement:
        items = [KnownItem(ItemPlace(m, lane, 0, ((0, 1),)), m, 0) for m in range(2)]
        return Announcement(
            kind=Kind.STEP, digests={0: lane, 1: 5}, items=(report_items("encoder", lane, items),)
        )

    table = Table({7: told(1), 8: told(0)})
    places = [(item.place.microbatch, item.place.lane) for item in table.items("encoder")]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert table.parted() == {0: {7: 1, 8: 0}}


def cost(lengths: tuple[int, ...], _rows: int) -> int:
    return sum(n * n for n in lengths)


def build(of: Layout, config: Any = CONFIG, wrap: Any = None, **settings: Any) -> Any:
    """This rank's loader as a run has it; `wrap` is given each rank's own source."""
    import torch.distributed as dist

    from megatron_mimo.data.loader.balanced import BalanceConfig, build_dispatcher
    from megatron_mimo.data.loader.share import SharedLoader, build_reading_group
    from megatron_mimo.data.loader.stream_loader import build_train_loader
    from megatron_mimo.data.text.tokenizer import ByteTokenizer

    rank = dist.get_rank()
    roles = [data_role(of, each) for each in range(of.world_size)]
    peers = build_reading_group(roles, rank)
    told = BalanceConfig(costs={"encoder": cost}, describe=of.describe_rank, **settings)
    dispatcher = build_dispatcher(of, roles, rank, config.inputs, told)
    source: Any = None
    if peers.reads:
        source = build_train_loader(config, roles[rank], ByteTokenizer(), dispatcher)
        if wrap is not None:
            wrap(rank, source)
    return SharedLoader(source, peers, inputs=config.inputs)


def steps_of(of: Layout, steps: int, config: Any = CONFIG, **settings: Any) -> list[Any]:
    loader = build(of, config, **settings)
    found = [loader.next_step() for _ in range(steps)]
    loader.close()
    return found


def test_every_item_is_run_once_with_its_content_and_its_seed(
    run_ranks: Callable[..., list],
) -> None:
    """What the ranks of a module pack together is what one rank packs."""
    image = replace(CONFIG.inputs["encoder"].config, position_crop=True)
    config = replace(CONFIG, inputs={"encoder": replace(CONFIG.inputs["encoder"], config=image)})
    of, alone = layout({"dp": 2}, {"dp": 3}), layout({"dp": 1}, {"offset": 0})
    found = run_ranks(of.world_size, steps_of, of, 2, config)
    ((*wanted,),) = run_ranks(1, steps_of, alone, 2, config)
    for number in range(2):
        ours = [step[number] for step in found[:2]]
        assert pieces(ours) == pieces([wanted[number]])
        # What moved is what a rank has run beyond its lanes.
        assert sum(each.dispatch.modules["encoder"].received for each in ours) > 0
        for m in range(len(ours[0].microbatches)):
            manifests = [step[number].microbatches[m].manifest for step in found]
            for lane, of_lane in enumerate(manifests[2:]):
                assert {entry.lane for entry in of_lane} <= {lane}
                for rank, other in enumerate(manifests[:2]):
                    seen = [entry for entry in other if entry.lane == lane]
                    if any(entry.source_rank == rank for entry in of_lane):
                        assert seen == list(of_lane)


def pieces(steps: list[Any]) -> list[tuple[Any, ...]]:
    """What is packed for each image of a step, in an order that does not depend on its rank."""
    found = []
    for step in steps:
        for microbatch in step.microbatches:
            packed = microbatch.inputs.get("encoder")
            if packed is None:
                continue
            slots = packed.patch_slots.numpy()
            bounds = packed.cu_seqlens.numpy()
            for start, stop in itertools.pairwise(bounds):
                here = (slots >= start) & (slots < stop)
                found.append(
                    (
                        stop - start,
                        packed.patches.numpy()[here].tobytes(),
                        np.round(packed.position_weight.numpy()[here], 5).tobytes(),
                    )
                )
    return sorted(found)


def test_what_a_replica_does_is_reported(run_ranks: Callable[..., list]) -> None:
    of = layout({"dp": 2}, {"dp": 2})
    found = run_ranks(of.world_size, steps_of, of, 3)
    for steps in zip(*found, strict=True):
        of_step = [step.dispatch.modules["encoder"] for step in steps[:2]]
        for m in range(3):
            run, by_lane = (
                [getattr(each, name)[m] for each in of_step] for name in ("as_run", "by_lane")
            )
            assert sum(run) == sum(by_lane)
            largest = max(each.largest[m] for each in of_step)
            assert max(run) <= max(max(by_lane), 1.025 * max(sum(run) / 2, largest) + 1)
        assert [step.dispatch.modules for step in steps[2:]] == [{}, {}]


def failing_at(number: int, rank: int) -> Callable[[int, Any], None]:
    """Makes the source of a rank fail while it draws a step."""

    def wrap(here: int, source: Any) -> None:
        draw, count = source._draw_microbatch, itertools.count()

        def torn() -> Any:
            if next(count) == 3 * (number - 1):
                raise ValueError("sample 'x' of shard 7 is torn")
            return draw()

        if here == rank:
            source._draw_microbatch = torn

    return wrap


def fail(of: Layout, number: int, rank: int) -> list[str]:
    """What ends a run in which one reader meets an error."""
    loader = build(of, wrap=failing_at(number, rank))
    return until_it_ends(loader, number)


def until_it_ends(loader: Any, number: int) -> list[str]:
    seen = []
    for _ in range(number):
        try:
            loader.next_step()
            seen.append("step")
        except Exception as error:
            seen.append(str(error))
            break
    loader.close()
    return seen


@pytest.mark.parametrize("number", [1, 3])
def test_an_error_of_one_reader_ends_all(number: int, run_ranks: Callable[..., list]) -> None:
    of = layout({"dp": 2, "tp": 2}, {"dp": 2})
    torn = "sample 'x' of shard 7 is torn"
    found = run_ranks(of.world_size, fail, of, number, 5)
    before = ["step"] * (number - 1)
    told = f"rank 5 (llm dp 1), which reads for this step: {torn}"
    assert found[5] == [*before, torn]
    assert found[0] == found[2] == found[4] == [*before, told]
    assert found[1] == [*before, f"rank 0, which reads for this one: {told}"]


def fail_late(of: Layout, rank: int) -> list[str]:
    """One rank cannot pack what it has got: the others know by the next step."""

    def wrap(here: int, source: Any) -> None:
        if here == rank:
            count, collate = itertools.count(), source._collate

            def torn(*arguments: Any) -> Any:
                if next(count) == 3:
                    raise MemoryError("no memory for pages")
                return collate(*arguments)

            source._collate = torn

    return until_it_ends(build(of, wrap=wrap), 4)


def test_an_error_after_the_exchange_ends_all_a_step_later(run_ranks: Callable[..., list]) -> None:
    of = layout({"dp": 2}, {"dp": 2})
    found = run_ranks(of.world_size, fail_late, of, 1)
    assert found[1] == ["step", "no memory for pages"]
    told = "rank 1 (encoder dp 1), which reads for this step: no memory for pages"
    for rank in (0, 2, 3):
        assert found[rank] == ["step", "step", told]


def close_after(of: Layout, steps: Mapping[int, int]) -> int:
    """Ranks end after the same step, whatever they have drawn ahead."""
    import time

    import torch.distributed as dist

    loader = build(of)
    rank = dist.get_rank()
    for _ in range(steps[rank]):
        loader.next_step()
    # Some come to the end much earlier than others.
    time.sleep(0.3 * rank)
    loader.close()
    return steps[rank]


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_all_leave_together(number: int, run_ranks: Callable[..., list]) -> None:
    of = layout({"dp": 2}, {"tp": 2, "dp": 2})
    steps = dict.fromkeys(range(of.world_size), number)
    assert run_ranks(of.world_size, close_after, of, steps) == [number] * of.world_size


def disagree(of: Layout, validate: bool) -> list[Any]:
    """Rank 3 reads other samples."""
    import torch.distributed as dist

    other = replace(CONFIG, seed=CONFIG.seed + (dist.get_rank() == 3))
    loader = build(of, other, validate=validate)
    try:
        step = loader.next_step()
    except ValueError as error:
        return [str(error)]
    finally:
        loader.close()
    return [step.balanced, step.dispatch, step.lane_digest]


def test_readers_that_disagree_leave_the_finding_to_the_agreement(
    run_ranks: Callable[..., list],
) -> None:
    of = layout({"dp": 2}, {"dp": 2})
    found = run_ranks(of.world_size, disagree, of, True)
    # As lanes decide, and nothing has moved.
    assert [each[:2] for each in found] == [[True, None]] * 4
    assert found[1][2][1] != found[3][2][1]
    for (message,) in run_ranks(of.world_size, disagree, of, False):
        assert "ranks 1 (encoder dp 1), 3 (llm dp 1) read other samples for lanes 1" in message
