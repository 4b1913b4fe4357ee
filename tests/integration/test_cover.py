"""Runs of few steps in which every two values of any two axes of a layout meet; see `cover`."""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import pytest

from megatron_mimo.topology import Layout
from tests.integration.cover import CASES, Case, Pair, named, pairs, possible_pairs
from tests.integration.curves import assert_parity
from tests.integration.documents import Document, encode
from tests.integration.engines import SEQ_LENGTH, micro_batch_size, shared_loader, small_runner
from tests.integration.state import Part, assemble, assert_same_state, parts_of

STEPS = 3
OVERRIDES = {
    # So large that experts' balance shows in loss and norms within a few steps.
    "hybrid": (
        "language.pattern=ME*-ME",
        "language.moe_aux_loss_coeff=0.1",
        "language.moe_router_bias_update_rate=0.05",
        "language.ffn_hidden_size=192",
        "vision.hidden_size=64",
        "vision.layer_scale=true",
    ),
    "dense": ("language.hidden_size=64", "vision.hidden_size=64"),
}
RECOMPUTE = {
    "": None,
    "full": ("full",),
    "selective": ("selective", "core_attn", "moe"),
}
# Loss, gradient norm and each module's norm of each step; the loss of an evaluation behind the
# last step; loads of experts in it, and their balance loss, by layer; all that was learnt.
Found = tuple[list[list[float]], float, list[list[float]], list[Part]]


def global_batch_size(case: Case) -> int:
    """Divides by 1, 2 and 3 lanes, mostly with several sequences to a microbatch.

    A packed sequence is a microbatch.
    """
    return 6 if case.packed else 12


def sequences(case: Case, step: int) -> list[tuple[Document, ...]]:
    """The documents of each sequence of a step: several sizes, none without a text."""
    random = np.random.default_rng([11, step])
    grids = ((4, 4), (2, 6), (4, 2), (6, 4), (2, 2))
    found = []
    for number in range(global_batch_size(case)):
        documents = []
        for place in range(1 + 2 * case.packed):
            images = int(random.integers(1, 3))
            # Whole sequences, since microbatches are to be without an image.
            if case.text_only and number % 2:
                images = 0
            chosen = tuple(grids[i] for i in random.integers(0, len(grids), images))
            seed = 1000 * step + 20 * number + place
            # Little padding either way: it is all alike, and hides what single tokens do.
            text = random.integers(6, 10) if case.packed else random.integers(30, 50)
            documents.append(Document(int(text), chosen, seed, apart=not case.packed))
        found.append(tuple(documents))
    return found


def data_of(case: Case, chosen: Layout) -> Any:
    """Settings of the samples."""
    from megatron_mimo.config.presets import model_config
    from megatron_mimo.data import DataConfig
    from megatron_mimo.media.images import ImageInput

    batch = global_batch_size(case)
    return DataConfig(
        provider="energon",
        path="fed by hand",
        seq_length=SEQ_LENGTH,
        micro_batch_size=1 if case.packed else micro_batch_size(chosen, batch),
        global_batch_size=batch,
        packing_buffer_size=2 if case.packed else None,
        inputs={"encoder": ImageInput(config=model_config("mock").part("vision").image_config())},
    )


def loader_of(case: Case, chosen: Layout, rank: int, dispatcher: Any = None) -> Any:
    """This rank's samples: the lanes take a step's sequences in turn."""
    from megatron_mimo.data import ByteTokenizer, StreamLoader, data_role
    from megatron_mimo.data.samples.sample import Drawn

    role = data_role(chosen, rank)
    streams: dict[int, Any] = {
        lane: Fed(
            [
                Drawn(
                    documents=tuple(
                        encode(document, f"{step}-{number}-{place}")
                        for place, document in enumerate(documents)
                    )
                )
                for step in range(STEPS)
                for number, documents in enumerate(sequences(case, step))
                if number % role.num_lanes == lane
            ]
        )
        for lane in role.lanes
    }
    return StreamLoader(streams, data_of(case, chosen), role, ByteTokenizer(), dispatcher)


class Fed:
    """A stream of given sequences that cannot be continued elsewhere."""

    def __init__(self, drawn: list[Any]) -> None:
        self._rest = iter(drawn)

    def __next__(self) -> Any:
        return next(self._rest)

    def state(self) -> dict[str, Any]:
        """No state."""
        return {}


def train_in_strict_groups(case: Case, **model: Any) -> Found:
    """As `train`, in groups that go wrong where NCCL's do; see `tests.strict`."""
    from tests.strict.install import StrictDevice, strict_groups

    with strict_groups():
        return train(case, StrictDevice("cpu"), **model)


def runner_of(case: Case, device: Any = None, **model: Any) -> Any:
    """This rank's runner of a case.

    Args:
        case: The run.
        device: Device of the ranks; None for a host.
        model: Further arguments of `small_runner`.
    """
    from megatron_mimo.model.config import Frozen

    family = case.model.split()[0]
    overlap = case.overlap.split("+")
    return small_runner(
        case.layout,
        steps=STEPS,
        provider={"hybrid": "nemotron-moe-vlm-tiny", "dense": "mock"}[family],
        overrides=OVERRIDES[family],
        tied_embeddings="tied" in case.model,
        freeze=Frozen(filter(None, case.frozen.split("+"))),
        run_ahead=case.run_ahead,
        check_bridge=case.check_bridge,
        sequence_parallel=case.sequence_parallel,
        recompute=RECOMPUTE[case.recompute],
        reduce={
            "overlap_grads": "gradients" in overlap,
            "overlap_params": "weights" in overlap,
            "num_buckets": 5 if case.overlap else None,
        },
        device=device,
        **model,
    )


def train(
    case: Case, device: Any = None, *, begin: Callable[[Any], None] | None = None, **model: Any
) -> Found:
    """What this rank finds; a curve on the ranks of the language model's last stage only.

    Args:
        case: The run.
        device: Device of the ranks; None for a host.
        begin: What is done to the runner before the first step; None for nothing.
        model: Further arguments of `small_runner`.
    """
    import torch.distributed as dist

    from megatron_mimo.training.step import evaluate, train_step

    engine = runner_of(case, device, **model)
    if begin is not None:
        begin(engine)
    loader: Any = loader_of(case, case.layout, dist.get_rank())
    if case.layout.domains:
        loader = shared_loader(
            case.layout,
            data_of(case, case.layout),
            engine,
            lambda _, dispatcher: loader_of(case, case.layout, dist.get_rank(), dispatcher),
        )
    points: list[list[float]] = []
    loads: list[list[float]] = []
    for step in range(STEPS):
        metrics = train_step(engine, loader, step + 1, global_batch_size(case))
        update = metrics.update
        norms = [update.grad_norm, *(update.module_norms[name] for name in ("encoder", "llm"))]
        points.append([float(metrics.loss), *norms])
        loads = [] if metrics.experts is None else metrics.experts.tolist()
    if case.layout.domains:
        loader.close()
    learnt = parts_of(engine)
    held_out = float(evaluate(engine, loader_of(case, case.layout, dist.get_rank()), 1))
    llm = engine.topology.target
    is_last = llm is not None and llm.is_last_stage
    return points if is_last else [], held_out, loads, learnt


def test_every_two_values_meet_in_some_run() -> None:
    """`python -m tests.integration.cover` prints another set when an axis or a value is new."""
    met = set[Pair]().union(*(pairs(asdict(case)) for case in CASES))
    missing = sorted(map(sorted, possible_pairs() - met))
    assert not missing
    assert [named(str(case)) for case in CASES] == CASES


Learnt = tuple[list[list[float]], float, list[list[float]], dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def one_rank(run_ranks: Callable[..., list]) -> Callable[[Case], Learnt]:
    """What one rank learns of a case's samples; each run is made once."""

    @cache
    def reference(case: Case) -> Learnt:
        ((points, held_out, loads, parts),) = run_ranks(1, train, case)
        return points, held_out, loads, assemble([parts])

    return reference


@pytest.mark.parametrize("case", CASES, ids=str)
def test_curve_and_every_gradient_are_those_of_one_rank(
    case: Case, run_ranks: Callable[..., list], one_rank: Callable[[Case], Learnt]
) -> None:
    wanted, wanted_held_out, wanted_loads, wanted_state = one_rank(case.reference)
    found: list[Found] = run_ranks(case.layout.world_size, train_in_strict_groups, case)
    curves = [(points, held_out) for points, held_out, *_ in found if points]
    assert curves
    for points, held_out in curves:
        assert_parity(wanted, points)
        assert held_out == pytest.approx(wanted_held_out, rel=1e-5)
        for point, expected in zip(points, wanted, strict=True):
            assert point[2:] == pytest.approx(expected[2:], rel=1e-4)
    tokens = sum(
        encode(document, "").num_positions
        for documents in sequences(case, STEPS - 1)
        for document in documents
    )
    for load in wanted_loads:
        # Each token of a step goes to two experts, whether or not the model trains.
        assert sum(load[:-1]) == 2 * tokens
    for loads in (loads for _, _, loads, _ in found if loads):
        for load, expected in zip(loads, wanted_loads, strict=True):
            assert load[:-1] == expected[:-1]
            assert load[-1] == pytest.approx(expected[-1], rel=1e-4)
    assert_same_state(assemble(parts for *_, parts in found), wanted_state)
