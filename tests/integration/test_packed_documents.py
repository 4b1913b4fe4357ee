"""Documents that share a sequence must not know of each other: losses, gradients, and leaks."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from megatron_mimo.topology import Layout
from tests.harness.slices import slow_but
from tests.integration.documents import Document, encode
from tests.integration.engines import SEQ_LENGTH, beside, layout, small_runner

if TYPE_CHECKING:
    from megatron_mimo.data.samples.sample import EncodedSample

HYBRID = {
    "provider": "nemotron-moe-vlm-tiny",
    # Balance is counted over whole sequences, of which packing makes fewer.
    "overrides": (
        "language.pattern=ME*-ME",
        "language.moe_aux_loss_coeff=0.0",
        "language.ffn_hidden_size=192",
        "vision.hidden_size=64",
    ),
}
# The mock model's positions are rotations, which must begin anew with each document.
GPT: dict[str, Any] = {"provider": "mock"}
ONE_RANK = layout({}, {})
LAYOUTS = {
    "one rank": ONE_RANK,
    "llm tp 2": beside({}, {"tp": 2}),
    "llm pp 2": beside({}, {"pp": 2}),
    "llm cp 2": beside({}, {"cp": 2}),
    "llm cp 4": beside({}, {"cp": 4}),
    "llm cp 2 tp 2": beside({"dp": 2}, {"cp": 2, "tp": 2}),
    "colocated, llm cp 2 pp 2": layout({"dp": 4}, {"cp": 2, "pp": 2}),
    "colocated, llm tp 2": layout({"dp": 2}, {"tp": 2}),
    "llm tp 2 pp 2, encoder tp 2": beside({"tp": 2}, {"tp": 2, "pp": 2}),
}


CONTEXT = [name for name in LAYOUTS if "cp" in name]

# 60 of 64 positions: the rest is padding. Two documents have the same length.
DOCUMENTS = (
    Document(8, ((4, 4), (2, 6)), 1),
    Document(9, (), 2),
    Document(16, ((4, 2),), 3),
    Document(7, ((4, 4),), 4),
    Document(11, (), 5),
)


def only_targets_of(sample: "EncodedSample", wanted: bool) -> "EncodedSample":
    return sample if wanted else replace(sample, targets=np.zeros_like(sample.targets))


def run(
    engine: Any, sequences: Sequence[tuple["EncodedSample", ...]], *, gradients: bool
) -> tuple[float, dict[str, Any]]:
    """Mean loss over the sequences as one step, and this rank's gradients."""
    import torch.distributed as dist

    from megatron_mimo.config.presets import model_config
    from megatron_mimo.data import ByteTokenizer, DataConfig, StreamLoader, data_role
    from megatron_mimo.data.samples.sample import Drawn
    from megatron_mimo.media.images import ImageInput
    from megatron_mimo.model.program import MimoStep
    from megatron_mimo.optim.mimo_optimizer import finalize_gradients
    from megatron_mimo.training.step import agree

    packs = any(len(documents) > 1 for documents in sequences)
    config = DataConfig(
        provider="energon",
        path="fed by hand",
        seq_length=SEQ_LENGTH,
        global_batch_size=len(sequences),
        packing_buffer_size=2 if packs else None,
        inputs={"encoder": ImageInput(config=model_config("mock").part("vision").image_config())},
    )
    role = data_role(engine.topology.layout, dist.get_rank())
    stream: Any = iter([Drawn(documents=documents) for documents in sequences])
    data = StreamLoader({0: stream}, config, role, ByteTokenizer()).next_step()
    texts = [m.text for m in data.microbatches if m.text is not None]
    assert all((text.lengths is not None) == packs for text in texts)
    agreement = agree(engine, data, "here")
    for replica in engine.model.replicas:
        replica.zero_grad()
    program = MimoStep(engine.model, engine.inputs.of(data))
    plans = [engine.executor.plan(manifest) for manifest in agreement.manifests]
    engine.executor.run(program, plans, gradients=gradients)
    if engine.model.target is not None:
        # Context-parallel ranks have the targets of their tokens.
        shared = engine.model.target.groups.pg_collection.dp_cp
        dist.all_reduce(program.loss_sum, group=shared)
    if not gradients:
        return float(program.loss_sum), {}
    finalize_gradients(engine.model, agreement.target_tokens)
    found = {}
    for replica in engine.model.replicas:
        groups = replica.groups.pg_collection
        for buffers, group in (
            (replica.ddp.buffers, groups.dp_cp),
            (replica.ddp.expert_parallel_buffers, groups.expt_dp),
        ):
            for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                # A rank holds the sum of its own shard only, as its optimizer needs no other.
                shards = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(shards, shards[group.rank()].clone(), group=group)
        for name, parameter in replica.module.named_parameters():
            found[f"{replica.groups.spec.name} {name}"] = parameter.main_grad.clone()
    return float(program.loss_sum), found


def differences(
    chosen: Layout, model: dict[str, Any], recompute: tuple[str, ...] | None = None
) -> tuple[list[list[float]], dict[str, float]]:
    """Packed and alone: the loss of each document, then of all; and how far gradients part."""
    engine = small_runner(chosen, recompute=recompute, **model)
    samples = [encode(document, f"document-{i}") for i, document in enumerate(DOCUMENTS)]
    losses = []
    for i, sample in enumerate(samples):
        marked = tuple(only_targets_of(other, other is sample) for other in samples)
        packed, _ = run(engine, [marked], gradients=False)
        losses.append([packed, run(engine, [(samples[i],)], gradients=False)[0]])
    packed, found = run(engine, [tuple(samples)], gradients=True)
    alone, wanted = run(engine, [(sample,) for sample in samples], gradients=True)
    parted = {}
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        assert scale > 0 or not found[name].any(), name
        parted[name] = float((found[name] - gradient).abs().max()) / (scale or 1.0)
    return [*losses, [packed, alone]], parted


def assert_alike(found: list[tuple[list[list[float]], dict[str, float]]]) -> None:
    seen = 0
    for losses, parted in found:
        for packed, alone in losses:
            seen += alone > 0
            assert packed == pytest.approx(alone, rel=1e-5)
        assert max(parted.values()) < 1e-4, {k: v for k, v in parted.items() if v >= 1e-4}
    assert seen >= len(DOCUMENTS) + 1


@pytest.mark.parametrize("name", slow_but(LAYOUTS, "one rank"))
def test_documents_are_learnt_as_if_they_were_alone(
    name: str, run_ranks: Callable[..., list]
) -> None:
    chosen = LAYOUTS[name]
    assert_alike(run_ranks(chosen.world_size, differences, chosen, HYBRID))


@pytest.mark.parametrize(
    "name", slow_but(["one rank", "llm tp 2", "llm pp 2", *CONTEXT], "one rank")
)
def test_positions_begin_anew(name: str, run_ranks: Callable[..., list]) -> None:
    chosen = LAYOUTS[name]
    assert_alike(run_ranks(chosen.world_size, differences, chosen, GPT))


@pytest.mark.slow
@pytest.mark.parametrize(
    "recompute", [("full",), ("selective", "core_attn", "mlp", "moe")], ids=",".join
)
def test_recomputing_keeps_documents_apart(
    recompute: tuple[str, ...], run_ranks: Callable[..., list]
) -> None:
    chosen = LAYOUTS["llm tp 2"]
    assert_alike(run_ranks(chosen.world_size, differences, chosen, HYBRID, recompute))


def leaks(chosen: Layout, model: dict[str, Any]) -> list[list[float]]:
    """Loss of each document as it is, then with each of the documents changed."""
    engine = small_runner(chosen, **model)
    rows = []
    for changed in (None, *range(len(DOCUMENTS))):
        samples = []
        for i, document in enumerate(DOCUMENTS):
            other = replace(document, seed=document.seed + 100 * (i == changed))
            samples.append(encode(other, f"document-{i}"))
        rows.append(
            [
                run(
                    engine,
                    [tuple(only_targets_of(s, i == j) for j, s in enumerate(samples))],
                    gradients=False,
                )[0]
                for i in range(len(samples))
            ]
        )
    return rows


@pytest.mark.parametrize("model", [HYBRID, GPT], ids=["hybrid", "gpt"])
def test_nothing_leaks_into_other_documents(
    model: dict[str, Any], run_ranks: Callable[..., list]
) -> None:
    """A document is changed with its images, of which one stands in front of the text."""
    assert_no_leaks(run_ranks(1, leaks, ONE_RANK, model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llm cp 2", "llm cp 4"])
@pytest.mark.parametrize("model", [HYBRID, GPT], ids=["hybrid", "gpt"])
def test_nothing_leaks_over_context_parallel_ranks(
    model: dict[str, Any], name: str, run_ranks: Callable[..., list]
) -> None:
    chosen = LAYOUTS[name]
    found = run_ranks(chosen.world_size, leaks, chosen, model)
    # Ranks of the encoder have no loss.
    assert_no_leaks([losses for losses in found if losses[0][0]])


def assert_no_leaks(ranks: list[list[list[float]]]) -> None:
    """Of each rank: losses as documents are, then with each of them changed."""
    assert ranks
    for wanted, *others in ranks:
        assert_only_changed_losses_differ(wanted, others)


def assert_only_changed_losses_differ(wanted: list[float], others: list[list[float]]) -> None:
    for changed, found in enumerate(others):
        for document, (loss, was) in enumerate(zip(found, wanted, strict=True)):
            if document == changed:
                assert abs(loss - was) > 1e-4 * was
            else:
                assert loss == pytest.approx(was, rel=1e-6)


def gradients_of_one(chosen: Layout, model: dict[str, Any]) -> dict[str, float]:
    """How far gradients of a document's loss part when another document is changed."""
    engine = small_runner(chosen, **model)
    parted: dict[str, float] = {}
    for changed in range(len(DOCUMENTS)):
        learnt = (changed + 2) % len(DOCUMENTS)
        found = []
        for seeds in (0, 100):
            samples = [
                only_targets_of(
                    encode(replace(document, seed=document.seed + seeds * (i == changed)), f"{i}"),
                    i == learnt,
                )
                for i, document in enumerate(DOCUMENTS)
            ]
            found.append(run(engine, [tuple(samples)], gradients=True)[1])
        as_it_was, after = found
        for name, gradient in as_it_was.items():
            scale = float(gradient.abs().max())
            apart = float((after[name] - gradient).abs().max())
            assert scale > 0 or not apart, name
            parted[name] = max(parted.get(name, 0.0), apart / (scale or 1.0))
    return parted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llm cp 2", "llm cp 4"])
@pytest.mark.parametrize("model", [HYBRID, GPT], ids=["hybrid", "gpt"])
def test_gradients_of_a_document_are_its_own(
    model: dict[str, Any], name: str, run_ranks: Callable[..., list]
) -> None:
    chosen = LAYOUTS[name]
    for parted in run_ranks(chosen.world_size, gradients_of_one, chosen, model):
        # Products over other tokens are summed in another order.
        assert max(parted.values()) < 1e-5, {k: v for k, v in parted.items() if v >= 1e-5}
