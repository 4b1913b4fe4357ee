"""Transfers are simulated with plain lists: every row must arrive where the manifest says."""

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.bridge.manifest import Manifest, ManifestEntry
from megatron_mimo.bridge.plan import Message, ModulePlan, encoder_plan, language_plan
from megatron_mimo.topology import Layout, ModuleGridSpec, assign_images


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    encoder = ModuleGridSpec(name="encoder", dp=draw(st.integers(1, 5)), tp=draw(st.integers(1, 3)))
    if encoder.size % 2 == 0 and draw(st.booleans()):
        llm = ModuleGridSpec(name="llm", tp=2, dp=encoder.size // 2)
        return Layout(encoder=encoder, llm=llm, world_size=encoder.size)
    llm = ModuleGridSpec(
        name="llm",
        offset=encoder.size,
        dp=draw(st.integers(1, 5)),
        tp=draw(st.integers(1, 3)),
    )
    return Layout(encoder=encoder, llm=llm, world_size=encoder.size + llm.size)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, Manifest]:
    layout = draw(layouts())
    assert layout.encoder is not None
    arbitrary = draw(st.booleans())
    entries = []
    for lane in range(layout.num_lanes):
        images = draw(st.lists(st.integers(0, 5), max_size=6))
        assigned = (
            tuple(draw(st.integers(0, layout.encoder.dp - 1)) for _ in images)
            if arbitrary
            else assign_images(len(images), layout.serving(lane), draw(st.integers(0, 7)))
        )
        entries += [
            ManifestEntry(lane, encoder_rank, rows)
            for encoder_rank, rows in zip(assigned, images, strict=True)
        ]
    return layout, tuple(entries)


def named_rows(entries: Iterator[tuple[int, ManifestEntry]]) -> list[tuple[int, int]]:
    """One name per row: (index of the image in the manifest, row within it)."""
    return [(index, row) for index, entry in entries for row in range(entry.rows)]


def cut(rows: list[tuple[int, int]], message: Message) -> list[tuple[int, int]]:
    return [row for start, stop in message.runs for row in rows[start:stop]]


def exchange(
    senders: dict[int, tuple[ModulePlan, list[tuple[int, int]]]],
    receivers: dict[int, tuple[ModulePlan, list[tuple[int, int]]]],
) -> None:
    """Deliver every message and check each receiver's rows; every send must be expected."""
    parcels = {
        (rank, message.peer): cut(rows, message)
        for rank, (plan, rows) in senders.items()
        for message in plan.sends
    }
    for rank, (plan, expected) in receivers.items():
        got: list[tuple[int, int] | None] = [None] * plan.num_rows
        for message in plan.receives:
            parcel = parcels.pop((message.peer, rank))
            assert len(parcel) == message.rows > 0
            places = [i for start, stop in message.runs for i in range(start, stop)]
            for place, row in zip(places, parcel, strict=True):
                assert got[place] is None
                got[place] = row
        assert got == expected
    assert not parcels


@given(cases())
def test_every_row_and_gradient_arrives_once(case: tuple[Layout, Manifest]) -> None:
    layout, manifest = case
    assert layout.encoder is not None
    encoder_side, language_side = {}, {}
    for rank in layout.encoder.ranks:
        place = layout.encoder.coordinates(rank)
        mine = named_rows((i, e) for i, e in enumerate(manifest) if e.encoder_rank == place.dp)
        encoder_side[rank] = (encoder_plan(layout, rank, manifest), mine)
    for rank in layout.llm.ranks:
        lane = layout.llm.coordinates(rank).dp
        mine = named_rows((i, e) for i, e in enumerate(manifest) if e.lane == lane)
        language_side[rank] = (language_plan(layout, rank, manifest), mine)
    exchange(encoder_side, language_side)
    exchange(language_side, encoder_side)


@given(cases())
def test_a_rank_needs_only_its_own_lanes(case: tuple[Layout, Manifest]) -> None:
    layout, manifest = case
    for rank in layout.llm.ranks:
        lane = layout.llm.coordinates(rank).dp
        local = tuple(entry for entry in manifest if entry.lane == lane)
        assert language_plan(layout, rank, local) == language_plan(layout, rank, manifest)


def test_tensor_parallel_senders_share_the_receivers() -> None:
    layout = Layout(
        encoder=ModuleGridSpec(name="encoder", tp=2),
        llm=ModuleGridSpec(name="llm", offset=2, tp=4),
        world_size=6,
    )
    manifest = (ManifestEntry(0, 0, 3),)
    assert [m.peer for m in encoder_plan(layout, 0, manifest).sends] == [2, 4]
    assert [m.peer for m in encoder_plan(layout, 1, manifest).sends] == [3, 5]


def test_neighbouring_images_travel_as_one_run() -> None:
    layout = Layout(
        encoder=ModuleGridSpec(name="encoder"),
        llm=ModuleGridSpec(name="llm", offset=1),
        world_size=2,
    )
    manifest = (ManifestEntry(0, 0, 3), ManifestEntry(0, 0, 0), ManifestEntry(0, 0, 4))
    assert encoder_plan(layout, 0, manifest).sends == (Message(1, ((0, 7),)),)


def test_no_images_no_messages() -> None:
    layout = Layout(
        encoder=ModuleGridSpec(name="encoder"),
        llm=ModuleGridSpec(name="llm", offset=1),
        world_size=2,
    )
    assert encoder_plan(layout, 0, ()) == ModulePlan(0, (), ())
    assert language_plan(layout, 1, (ManifestEntry(0, 0, 0),)) == ModulePlan(0, (), ())
