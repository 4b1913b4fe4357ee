"""Stages and shards of the language model against the whole of it on one rank."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from megatron_mimo.topology import Layout, ModuleGridSpec
from tests.unit_tests.model.by_hand import IMAGE, LENGTH, VOCAB, WIDTH, assert_close

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_mimo.data.loader.batch import TextBatch
    from megatron_mimo.model.mimo import MimoModel

BATCH = 2
EMBEDDING, OUTPUT = "model.embedding.word_embeddings.weight", "model.output_layer.weight"


def llm_layout(**sizes: int) -> Layout:
    """A language model alone."""
    grid = ModuleGridSpec(name="llm", **sizes)
    return Layout.of(grid, world_size=grid.size)


def text_batch() -> "TextBatch":
    """The same tokens on every rank, a third of them image tokens."""
    import torch

    from megatron_mimo.data.loader.batch import TextBatch

    random = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, IMAGE, (BATCH, LENGTH + 1), generator=random)
    images = torch.rand(tokens.shape, generator=random) < 1 / 3
    tokens = torch.where(images, IMAGE, tokens)
    return TextBatch(
        sample_keys=tuple(str(i) for i in range(BATCH)),
        input_ids=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=(torch.rand(BATCH, LENGTH, generator=random) < 0.7).float(),
        position_ids=torch.arange(LENGTH).expand(BATCH, -1).contiguous(),
        padding=torch.zeros(BATCH, LENGTH, dtype=torch.bool),
    )


def rows_of(text: "TextBatch", held: list[int]) -> "tuple[list[int], Tensor]":
    """Rows of the image tokens at some positions: their numbers in the batch, and values."""
    import torch

    tokens = text.input_ids.tolist()
    places = [(b, s) for b in range(BATCH) for s in range(LENGTH) if tokens[b][s] == IMAGE]
    numbers = [number for number, (_, s) in enumerate(places) if s in held]
    rows = torch.randn(len(places), WIDTH, generator=torch.Generator().manual_seed(6))
    return numbers, rows[numbers]


def positions_of(model: "MimoModel") -> tuple[list[int], list[int]]:
    """Positions that this rank's cp rank reads, and that this rank embeds."""
    assert model.target is not None
    sharding, place = model.sharding, model.target.groups.place
    shard = sharding.shard(cp_rank=place.cp, tp_rank=place.tp)
    read, embedded = sharding.of().cp_intervals(place.cp), sharding.of().intervals(shard)
    return (
        [p for start, stop in read for p in range(start, stop)],
        [p for start, stop in embedded for p in range(start, stop)],
    )


@dataclasses.dataclass(frozen=True)
class Found:
    """What one rank saw of a step.

    Attributes:
        loss: Summed over the cp ranks; None before the last stage.
        gradients: Parameter -> its whole gradient.
        row_gradients: Image token, counted over the batch -> gradient of its row.
    """

    loss: float | None
    gradients: "dict[str, Tensor]"
    row_gradients: "dict[int, Tensor]"


def step(layout: Layout, sequence_parallel: bool, tied: bool) -> Found:
    """Forward and backward of one microbatch over the stages, gradients finalised."""
    import torch.distributed as dist

    from megatron_mimo.data.loader.batch import Microbatch
    from megatron_mimo.model.inputs import InputReader
    from megatron_mimo.model.program import MimoStep
    from megatron_mimo.optim.mimo_optimizer import finalize_gradients
    from megatron_mimo.topology.groups import build_topology
    from tests.unit_tests.model.by_hand import run_stage, small_model, whole_gradients

    topology = build_topology(layout)
    model = small_model(topology, sequence_parallel=sequence_parallel, tied=tied)
    assert model.target is not None
    language, text = model.target, text_batch()
    microbatch = Microbatch(index=0, manifest=(), keys={}, text=text, inputs={})
    reader = InputReader(model, {"encoder": IMAGE})
    program = MimoStep(model, reader.prepare([microbatch]))
    numbers, rows = rows_of(text, positions_of(model)[1])
    rows.requires_grad_()
    feeds = "encoder" if language.groups.is_first_stage else "llm"
    run_stage(
        language,
        lambda inputs: program.forward("llm", 0, {feeds: inputs}),
        program.hidden_rows("llm", 0),
        rows,
    )
    finalize_gradients(model, 1)
    loss = program.loss_sum
    dist.all_reduce(loss, group=language.groups.pg_collection.dp_cp)
    return Found(
        float(loss) if language.groups.is_last_stage else None,
        whole_gradients(language),
        {} if rows.grad is None else dict(zip(numbers, rows.grad, strict=True)),
    )


def logits(layout: Layout, sequence_parallel: bool) -> "tuple[list[int], Tensor]":
    """Positions that this rank reads, and logits [B, positions, V] at them."""
    import torch
    import torch.distributed as dist

    from megatron_mimo.modules.language.merge import row_positions
    from megatron_mimo.topology.groups import build_topology
    from tests.unit_tests.model.by_hand import small_model

    model = small_model(build_topology(layout), sequence_parallel=sequence_parallel)
    assert model.target is not None
    text = text_batch()
    read, embedded = positions_of(model)
    with torch.no_grad():
        mine = model.target(
            text.input_ids[:, read],
            text.position_ids[:, read],
            None,
            rows_of(text, embedded)[1],
            row_positions(text.input_ids, IMAGE, torch.tensor(embedded)),
        ).contiguous()
    tp = model.target.groups.pg_collection.tp
    shards = [torch.empty_like(mine) for _ in range(tp.size())]
    dist.all_gather(shards, mine, group=tp)
    return read, torch.cat(shards, dim=-1)


@pytest.fixture(scope="module")
def one_rank(run_ranks: Callable[..., list]) -> dict[bool, Found]:
    """The step of one rank, with and without tied embeddings."""
    return {tied: run_ranks(1, step, llm_layout(), True, tied)[0] for tied in (False, True)}


def assert_same(ranks: list[Found], wanted: Found) -> None:
    """Every rank agrees with one rank, and together they hold all of it."""
    losses = [found.loss for found in ranks if found.loss is not None]
    assert losses == pytest.approx([wanted.loss] * len(losses), rel=1e-6)
    assert losses
    assert set().union(*(found.gradients for found in ranks)) == set(wanted.gradients)
    assert set().union(*(found.row_gradients for found in ranks)) == set(wanted.row_gradients)
    for found in ranks:
        for name, gradient in found.gradients.items():
            assert_close(gradient, wanted.gradients[name], name)
        for number, gradient in found.row_gradients.items():
            assert_close(gradient, wanted.row_gradients[number], f"row {number}")


@pytest.mark.parametrize(
    "sizes",
    [
        {"tp": 2},
        # Two key-value heads over four ranks.
        {"tp": 4},
        {"cp": 2},
        {"cp": 3},
        {"pp": 2},
        {"pp": 4},
        {"tp": 2, "cp": 2},
        {"tp": 2, "pp": 2},
        {"cp": 2, "pp": 2},
    ],
    ids=str,
)
def test_gradients_are_those_of_one_rank(
    run_ranks: Callable[..., list], one_rank: dict[bool, Found], sizes: dict[str, int]
) -> None:
    layout = llm_layout(**sizes)
    assert_same(run_ranks(layout.world_size, step, layout, True, False), one_rank[False])


def test_without_sequence_parallelism(
    run_ranks: Callable[..., list], one_rank: dict[bool, Found]
) -> None:
    assert_same(run_ranks(4, step, llm_layout(tp=2, cp=2), False, False), one_rank[False])


@pytest.mark.parametrize(
    "sizes",
    [{"pp": 2}, {"pp": 4}, {"tp": 2, "pp": 2}, {"cp": 2, "pp": 2}, {"tp": 2, "cp": 2}],
    ids=str,
)
def test_tied_embeddings_sum_the_gradients_of_both_ends(
    run_ranks: Callable[..., list], one_rank: dict[bool, Found], sizes: dict[str, int]
) -> None:
    layout, wanted = llm_layout(**sizes), one_rank[True]
    assert OUTPUT not in wanted.gradients
    if layout.target.pp > 1:
        # The last stage has a copy, which must get the same gradient.
        both_ends = wanted.gradients | {OUTPUT: wanted.gradients[EMBEDDING]}
        wanted = dataclasses.replace(wanted, gradients=both_ends)
    assert_same(run_ranks(layout.world_size, step, layout, True, True), wanted)


@pytest.mark.parametrize(
    ("sizes", "sequence_parallel"),
    [
        ({"cp": 2}, True),
        ({"cp": 4}, True),
        ({"cp": 2, "tp": 2}, True),
        ({"cp": 2, "tp": 2}, False),
    ],
    ids=str,
)
def test_logits_of_context_parallel_ranks_are_those_of_one(
    run_ranks: Callable[..., list], sizes: dict[str, int], sequence_parallel: bool
) -> None:
    layout = llm_layout(**sizes)
    ((_, wanted),) = run_ranks(1, logits, llm_layout(), True)
    assert wanted.shape == (BATCH, LENGTH, VOCAB)
    read: set[int] = set()
    for positions, found in run_ranks(layout.world_size, logits, layout, sequence_parallel):
        assert_close(found, wanted[:, positions], f"positions {positions}")
        read.update(positions)
    assert read == set(range(LENGTH))


def tied_weights(init: str) -> "Tensor":
    """The tied weight of this stage as it starts."""
    import torch.distributed as dist

    from megatron_mimo.topology.groups import build_topology
    from tests.unit_tests.model.by_hand import small_model

    topology = build_topology(llm_layout(pp=dist.get_world_size()))
    language = small_model(topology, tied=True, init=init).target
    assert language is not None
    return language.module.shared_embedding_or_output_weight().detach().clone()


@pytest.mark.parametrize("init", ["megatron", "topology-invariant"])
def test_tied_embeddings_start_equal(run_ranks: Callable[..., list], init: str) -> None:
    first, last = run_ranks(2, tied_weights, init)
    assert float(first.std()) > 0
    assert first.equal(last)
