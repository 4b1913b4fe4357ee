import itertools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.role import DataRole, data_role, equal_readers
from megatron_mimo.topology import Layout, ModuleGridSpec

CONFIG = DataConfig(global_batch_size=8, micro_batch_size=2, text_only_fraction=0.3)


def layout(encoder: dict[str, int], llm: dict[str, int], *, colocated: bool = False) -> Layout:
    first = ModuleGridSpec(name="encoder", **encoder)
    second = ModuleGridSpec(name="llm", offset=0 if colocated else first.size, **llm)
    return Layout.of(first, second, world_size=second.offset + second.size)


def roles(of: Layout) -> list[DataRole]:
    return [data_role(of, rank) for rank in range(of.world_size)]


def groups_of(of: Layout) -> tuple[tuple[int, ...], ...]:
    return equal_readers(roles(of))


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (layout({"dp": 2}, {"dp": 2}), ((0,), (1,), (2,), (3,))),
        (layout({"tp": 2}, {"tp": 2, "dp": 2}), ((0, 1), (2, 3), (4, 5))),
        (layout({}, {"pp": 2, "cp": 2, "dp": 2}), ((0,), (1, 2, 5, 6), (3, 4, 7, 8))),
        # Colocated ranks read for two modules: peers in one of them alone are none.
        (layout({"dp": 2}, {"tp": 2}, colocated=True), ((0,), (1,))),
        (layout({"tp": 4}, {"tp": 2, "dp": 2}, colocated=True), ((0, 1), (2, 3))),
    ],
)
def test_replicas_share_a_reader(
    of: Layout, expected: tuple[tuple[int, ...], ...], run_ranks: Callable[..., list]
) -> None:
    assert run_ranks(1, groups_of, of) == [expected]


def compare(of: Layout, steps: int) -> tuple[bool, int]:
    """Take steps from a shared loader, and compare each with what this rank would read."""
    import torch.distributed as dist

    from megatron_mimo.data.loader.share import SharedLoader, build_reading_group
    from megatron_mimo.data.loader.stream_loader import build_train_loader
    from megatron_mimo.data.text.tokenizer import ByteTokenizer
    from tests.unit_tests.data.loader.test_wire import assert_same

    everyone = roles(of)
    rank = dist.get_rank()
    peers = build_reading_group(everyone, rank)

    def read() -> Any:
        return build_train_loader(CONFIG, everyone[rank], ByteTokenizer())

    own = read()
    shared = SharedLoader(read() if peers.reads else None, peers, inputs=CONFIG.inputs)
    for _ in range(steps):
        assert_same(shared.next_step(), own.next_step())
        if peers.reads:
            assert shared.state() == own.state()
    shared.close()
    return peers.reads, len(shared.state())


def test_peers_get_what_they_would_have_read(run_ranks: Callable[..., list]) -> None:
    of = layout({"tp": 2}, {"tp": 2})
    assert run_ranks(4, compare, of, 5) == [(True, 1), (False, 0), (True, 1), (False, 0)]


def test_close_before_the_first_step_and_after_one(run_ranks: Callable[..., list]) -> None:
    of = layout({"tp": 2}, {"tp": 2})
    for steps in (0, 1):
        run_ranks(4, compare, of, steps)


def resume(of: Layout) -> None:
    """A loader that goes on from the state behind step 2, though step 3 was drawn ahead."""
    import torch.distributed as dist

    from megatron_mimo.data.loader.share import SharedLoader, build_reading_group
    from megatron_mimo.data.loader.stream_loader import build_train_loader
    from megatron_mimo.data.text.tokenizer import ByteTokenizer
    from tests.unit_tests.data.loader.test_wire import assert_same

    everyone = roles(of)
    rank = dist.get_rank()

    def build() -> SharedLoader:
        peers = build_reading_group(everyone, rank)
        source = build_train_loader(CONFIG, everyone[rank], ByteTokenizer())
        return SharedLoader(source if peers.reads else None, peers, inputs=CONFIG.inputs)

    whole, begun, again = build(), build(), build()
    expected = [whole.next_step() for _ in range(4)]
    for _ in range(2):
        begun.next_step()
    states: list[Mapping[int, Any]] = [{} for _ in range(of.world_size)]
    dist.all_gather_object(states, begun.state())
    again.restore({lane: state for part in states for lane, state in part.items()})
    for step in expected[2:]:
        assert_same(again.next_step(), step)
    for loader in (whole, begun, again):
        loader.close()


def test_state_is_that_of_the_steps_taken(run_ranks: Callable[..., list]) -> None:
    run_ranks(3, resume, layout({}, {"tp": 2}))


class Failing:
    """Steps without end but for the third."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._count = itertools.count(1)

    def next_step(self) -> Any:
        if next(self._count) == 3:
            raise ValueError("sample 'x' of shard 7 is torn")
        return self._source.next_step()

    def state(self) -> dict[int, Any]:
        return {}

    def fail(self, _error: Exception) -> None:
        pass

    def end(self) -> None:
        pass


def fail(of: Layout) -> list[str]:
    """What ends a run whose reader meets an error."""
    import torch.distributed as dist

    from megatron_mimo.data.loader.share import SharedLoader, build_reading_group
    from megatron_mimo.data.loader.stream_loader import build_train_loader
    from megatron_mimo.data.text.tokenizer import ByteTokenizer

    everyone = roles(of)
    rank = dist.get_rank()
    peers = build_reading_group(everyone, rank)
    source: Any = Failing(build_train_loader(CONFIG, everyone[rank], ByteTokenizer()))
    shared = SharedLoader(source if peers.reads else None, peers, inputs=CONFIG.inputs)
    seen = []
    for _ in range(3):
        try:
            shared.next_step()
            seen.append("step")
        except ValueError as error:
            seen.append(str(error))
    shared.close()
    return seen


def test_an_error_of_the_reader_ends_its_peers_too(run_ranks: Callable[..., list]) -> None:
    found = run_ranks(3, fail, layout({}, {"tp": 2}))
    torn = "sample 'x' of shard 7 is torn"
    assert found[1] == ["step", "step", torn]
    assert found[2] == ["step", "step", f"rank 1, which reads for this one: {torn}"]


def trace(of: Layout, folder: str) -> None:
    import torch.distributed as dist

    from megatron_mimo.data.loader.share import SharedLoader, build_reading_group
    from megatron_mimo.data.loader.stream_loader import build_train_loader
    from megatron_mimo.data.loader.trace import SampleTrace
    from megatron_mimo.data.text.tokenizer import ByteTokenizer

    everyone = roles(of)
    rank = dist.get_rank()
    peers = build_reading_group(everyone, rank)
    source = None
    record = None
    if peers.reads:
        source = build_train_loader(CONFIG, everyone[rank], ByteTokenizer())
        record = SampleTrace(folder, rank, "role")
    shared = SharedLoader(source, peers, inputs=CONFIG.inputs, trace=record)
    for _ in range(2):
        shared.next_step()
    shared.close()


def test_only_steps_that_were_taken_are_traced(
    tmp_path: Path, run_ranks: Callable[..., list]
) -> None:
    run_ranks(3, trace, layout({}, {"tp": 2}), str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rank-00000.jsonl",
        "rank-00001.jsonl",
    ]
    for path in tmp_path.iterdir():
        assert len(path.read_text().splitlines()) == 2


def alone(prepare: Callable[[Any], Any]) -> Any:
    """A loader of a rank without peers that prepares every step."""
    from megatron_mimo.data.loader.share import ReadingGroup, SharedLoader
    from megatron_mimo.data.loader.stream_loader import build_train_loader
    from megatron_mimo.data.text.tokenizer import ByteTokenizer

    role = data_role(layout({}, {}, colocated=True), 0)
    source = build_train_loader(CONFIG, role, ByteTokenizer())
    loader = SharedLoader(source, ReadingGroup((0,), None, 0), inputs=CONFIG.inputs)
    loader.prepare_ahead(prepare)
    return loader


def test_steps_are_prepared_where_they_are_drawn() -> None:
    def prepare(microbatches: Any) -> tuple[str, int]:
        return threading.current_thread().name, len(microbatches)

    loader = alone(prepare)
    steps = [loader.next_step() for _ in range(3)]
    loader.close()
    here = threading.current_thread().name
    number = len(steps[0].microbatches)
    assert [step.prepared for step in steps] == [
        (here, number),
        ("next-step", number),
        ("next-step", number),
    ]


def test_an_error_while_preparing_is_raised_by_the_step() -> None:
    made = itertools.count(1)

    def prepare(_microbatches: Any) -> None:
        if next(made) == 2:
            raise RuntimeError("no page-locked memory is left")

    loader = alone(prepare)
    loader.next_step()
    with pytest.raises(RuntimeError, match="no page-locked memory is left"):
        loader.next_step()
    loader.close()
