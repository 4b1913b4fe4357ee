"""Padding takes no part in what is learnt: the same samples in longer sequences train the same."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_mimo.topology import Layout
from tests.integration.curves import assert_parity
from tests.integration.documents import Document, encode
from tests.integration.engines import beside, layout, micro_batch_size, small_runner
from tests.integration.state import Part, assemble, assert_same_state, parts_of

STEPS = 3
SEQUENCES = 4
# So large that experts' balance shows in loss and norms within a few steps.
OVERRIDES = (
    "language.pattern=ME*-ME",
    "language.moe_aux_loss_coeff=0.1",
    "language.moe_router_bias_update_rate=0.05",
    "language.ffn_hidden_size=192",
    "vision.hidden_size=64",
)
LENGTH = 64
"""Positions that hold the longest of the samples, alone or packed."""
# Most sequences of a lane are short, and of the other's long.
TEXTS = ((9, 3), (50, 8), (14, 5), (38, 21))
LAYOUTS = {
    "one rank": layout({}, {}),
    "llm tp 2 ep 2": beside({}, {"tp": 2, "ep": 2}),
    "llm cp 2": beside({}, {"cp": 2}),
    "llm pp 2 dp 2 ep 2": beside({}, {"pp": 2, "dp": 2, "ep": 2}),
}
# Points of the curve; loads of experts and balance loss of the last step; all that was learnt.
Found = tuple[list[list[float]], list[list[float]], list[Part]]


def sequences(step: int, packed: bool) -> Iterator[tuple[Document, ...]]:
    """The documents of each sequence of a step."""
    for number, texts in enumerate(TEXTS):
        seed = 100 * step + 10 * number
        yield tuple(
            Document(text, ((2, 2),) if place == 0 else (), seed + place)
            for place, text in enumerate(texts if packed else texts[:1])
        )


def train(
    chosen: Layout, length: int, packed: bool, recompute: tuple[str, ...] | None = None
) -> Found:
    """Train on sequences of some length."""
    import torch.distributed as dist

    from megatron_mimo.config.presets import model_config
    from megatron_mimo.data import ByteTokenizer, DataConfig, StreamLoader, data_role
    from megatron_mimo.data.samples.sample import Drawn
    from megatron_mimo.media.images import ImageInput
    from megatron_mimo.training.step import train_step

    engine = small_runner(
        chosen,
        steps=STEPS,
        provider="nemotron-moe-vlm-tiny",
        overrides=OVERRIDES,
        seq_length=length,
        recompute=recompute,
    )
    config = DataConfig(
        provider="energon",
        path="fed by hand",
        seq_length=length,
        micro_batch_size=1 if packed else micro_batch_size(chosen, SEQUENCES),
        global_batch_size=SEQUENCES,
        packing_buffer_size=2 if packed else None,
        inputs={"encoder": ImageInput(config=model_config("mock").part("vision").image_config())},
    )
    role = data_role(chosen, dist.get_rank())
    streams: dict[int, Any] = {
        lane: iter(
            [
                Drawn(documents=tuple(encode(document, str(document)) for document in documents))
                for step in range(STEPS)
                for number, documents in enumerate(sequences(step, packed))
                if number % role.num_lanes == lane
            ]
        )
        for lane in role.lanes
    }
    loader = StreamLoader(streams, config, role, ByteTokenizer())
    points: list[list[float]] = []
    loads: list[list[float]] = []
    for step in range(STEPS):
        metrics = train_step(engine, loader, step + 1, SEQUENCES)
        points.append([float(metrics.loss), metrics.update.grad_norm])
        loads = [] if metrics.experts is None else metrics.experts.tolist()
    target = engine.topology.target
    return points if target is not None and target.is_last_stage else [], loads, parts_of(engine)


@pytest.fixture(scope="module")
def little_padding(run_ranks: Callable[..., list]) -> Callable[[bool], Found]:
    """Packed or not -> what one rank learns from the shortest sequences."""
    found: dict[bool, Found] = {}

    def of(packed: bool) -> Found:
        if packed not in found:
            (found[packed],) = run_ranks(1, train, layout({}, {}), LENGTH, packed)
        return found[packed]

    return of


def assert_learnt(found: list[Found], wanted: Found, packed: bool) -> None:
    """All ranks together have learnt the same."""
    points, loads, parts = wanted
    tokens = sum(
        encode(document, "").num_positions
        for documents in sequences(STEPS - 1, packed)
        for document in documents
    )
    for load in loads:
        assert sum(load[:-1]) == 2 * tokens
        # It is 1 where all experts are chosen alike, as those of random weights nearly are.
        assert load[-1] == pytest.approx(1, abs=0.3)
    curves = [curve for curve, *_ in found if curve]
    assert curves
    for curve in curves:
        assert_parity(points, curve)
    for other in (other for _, other, _ in found if other):
        for load, expected in zip(other, loads, strict=True):
            assert load[:-1] == expected[:-1]
            assert load[-1] == pytest.approx(expected[-1], rel=1e-4)
    assert_same_state(assemble(part for *_, part in found), assemble([parts]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_samples_in_longer_sequences_are_learnt_alike(
    name: str, run_ranks: Callable[..., list], little_padding: Callable[[bool], Found]
) -> None:
    chosen = LAYOUTS[name]
    found = run_ranks(chosen.world_size, train, chosen, 3 * LENGTH, False)
    assert_learnt(found, little_padding(False), False)


@pytest.mark.parametrize("name", ["llm tp 2 ep 2", "llm cp 2", "llm pp 2 dp 2 ep 2"])
def test_packs_in_longer_sequences_are_learnt_alike(
    name: str, run_ranks: Callable[..., list], little_padding: Callable[[bool], Found]
) -> None:
    chosen = LAYOUTS[name]
    found = run_ranks(chosen.world_size, train, chosen, 3 * LENGTH, True)
    assert_learnt(found, little_padding(True), True)


@pytest.mark.parametrize("recompute", [("full",), ("selective", "core_attn", "moe")], ids=",".join)
def test_recomputed_experts_leave_padding_out_too(
    recompute: tuple[str, ...],
    run_ranks: Callable[..., list],
    little_padding: Callable[[bool], Found],
) -> None:
    found = run_ranks(1, train, layout({}, {}), 3 * LENGTH, False, recompute)
    assert_learnt(found, little_padding(False), False)
