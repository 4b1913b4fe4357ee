"""What must always hold: frozen parts stay, vision counts, bad gradients change nothing."""

from collections.abc import Callable

import pytest

from megatron_mimo.model.config import FreezeConfig
from megatron_mimo.topology import Layout
from tests.integration.engines import (
    beside,
    layout,
    list_loader,
    mock_data,
    mock_loader,
    small_engine,
)

FAN_OUT = beside({}, {"dp": 2})
PARTS = ("vision", "projector", "model")


def snapshot(engine) -> dict[str, list]:
    """Copies of this rank's parameters by part of the model."""
    return {
        part: [
            parameter.detach().clone()
            for replica in engine.model.replicas
            for name, parameter in replica.module.named_parameters()
            if name.startswith(f"{part}.")
        ]
        for part in PARTS
    }


def moved_parts(chosen: Layout, freeze: FreezeConfig) -> set[str]:
    """Train two steps; the parts whose parameters changed on this rank."""
    import torch

    from megatron_mimo.training.step import train_step

    engine = small_engine(chosen, freeze=freeze)
    loader = mock_loader(chosen, mock_data())
    before = snapshot(engine)
    for iteration in (1, 2):
        train_step(engine, loader, iteration, 8)
    after = snapshot(engine)
    return {
        part
        for part in PARTS
        if any(not torch.equal(a, b) for a, b in zip(before[part], after[part], strict=True))
    }


@pytest.mark.parametrize(
    ("freeze", "trains"),
    [
        (FreezeConfig(), {"vision", "projector", "model"}),
        (FreezeConfig(vision=True), {"projector", "model"}),
        (FreezeConfig(vision=True, language=True), {"projector"}),
        (FreezeConfig(vision=True, projector=True), {"model"}),
    ],
    ids=["all train", "vision frozen", "projector alone", "encoder side frozen"],
)
def test_exactly_what_is_not_frozen_moves(
    freeze: FreezeConfig, trains: set[str], run_ranks: Callable[..., list]
) -> None:
    encoder, *lanes = run_ranks(3, moved_parts, FAN_OUT, freeze)
    assert encoder == trains - {"model"}
    assert lanes == [trains & {"model"}] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("freeze", "trains"),
    [
        (FreezeConfig(vision=True), {"projector", "model"}),
        (FreezeConfig(vision=True, language=True), {"projector"}),
        (FreezeConfig(language=True), {"vision", "projector"}),
        (FreezeConfig(vision=True, projector=True), {"model"}),
    ],
    ids=["vision frozen", "projector alone", "language frozen", "encoder side frozen"],
)
def test_frozen_stages_and_shards_hold_nobody_up(
    freeze: FreezeConfig, trains: set[str], run_ranks: Callable[..., list]
) -> None:
    """The first stage of a frozen encoder has no optimizer, and few shards have rows."""
    first, last, *lane = run_ranks(4, moved_parts, beside({"pp": 2}, {"tp": 2}), freeze)
    assert first == trains & {"vision"}
    assert last == trains - {"model"}
    assert lane == [trains & {"model"}] * 2
    _, *stages = run_ranks(3, moved_parts, beside({}, {"pp": 2}), freeze)
    assert stages == [trains & {"model"}] * 2


def step_without_rows(chosen: Layout) -> str:
    """One step of a model that ignores the rows; the error's text."""
    from megatron_mimo.model import modules
    from megatron_mimo.training.step import train_step

    engine = small_engine(chosen)
    loader = mock_loader(chosen, mock_data())
    merge, modules.merge_rows = modules.merge_rows, lambda text, rows, _: text + 0 * rows.sum()
    try:
        train_step(engine, loader, 1, 8)
    except RuntimeError as error:
        return str(error)
    finally:
        modules.merge_rows = merge
    return ""


def test_a_trainable_encoder_without_gradient_stops_the_run(run_ranks: Callable[..., list]) -> None:
    for message in run_ranks(3, step_without_rows, FAN_OUT):
        assert "the gradient of the trainable encoder is zero: vision does not train" in message


def step_with_broken_weight(chosen: Layout) -> tuple[bool, bool, float]:
    """One step with an infinite weight: (applied, parameters changed, learning rate moved)."""
    import torch

    from megatron_mimo.training.step import train_step

    engine = small_engine(chosen)
    loader = mock_loader(chosen, mock_data())
    if engine.model.language is not None:
        # Of both replicas: they must stay equal for the comparison below.
        engine.model.language.module.model.output_layer.weight.data[3, 3] = float("inf")
    before = snapshot(engine)
    rate = engine.scheduler.num_steps
    metrics = train_step(engine, loader, 1, 8)
    after = snapshot(engine)
    changed = any(
        not torch.equal(a, b)
        for part in PARTS
        for a, b in zip(before[part], after[part], strict=True)
    )
    return metrics.update.applied, changed, engine.scheduler.num_steps - rate


def test_gradients_that_are_not_finite_change_nothing_anywhere(
    run_ranks: Callable[..., list],
) -> None:
    found = run_ranks(3, step_with_broken_weight, FAN_OUT)
    assert found == [(False, False, 0)] * 3


def losses_with_other_images(chosen: Layout) -> tuple[float, float]:
    """Evaluate one batch as it is, and with its images replaced by noise."""
    import dataclasses

    import torch

    from megatron_mimo.training.step import evaluate

    engine = small_engine(chosen)
    step = mock_loader(chosen, mock_data()).next_step()
    noise = torch.Generator().manual_seed(1)
    other = dataclasses.replace(
        step,
        microbatches=tuple(
            m
            if m.images is None
            else dataclasses.replace(
                m,
                images=dataclasses.replace(
                    m.images, patches=torch.randn(m.images.patches.shape, generator=noise)
                ),
            )
            for m in step.microbatches
        ),
    )

    class Once:
        def __init__(self, data):
            self.data = data

        def next_step(self):
            return self.data

    return tuple(float(evaluate(engine, Once(data), 1)) for data in (step, other))


def test_the_images_reach_the_loss(run_ranks: Callable[..., list]) -> None:
    _, (seen, other), _ = run_ranks(3, losses_with_other_images, FAN_OUT)
    assert abs(seen - other) > 1e-3


def learn_and_answer(chosen: Layout, bf16: bool) -> tuple[float, dict | None]:
    """Overfit eight samples and answer them: (last loss, answers by key on the logging rank).

    An answer is (expected, generated) tokens.
    """
    import torch.distributed as dist

    from megatron_mimo.data import ByteTokenizer, build_list_loader
    from megatron_mimo.data.mock import Split, mock_sample
    from megatron_mimo.training.engine import data_role
    from megatron_mimo.training.exact_match import write_answers
    from megatron_mimo.training.step import train_step

    steps, config = 60, mock_data(micro_batch_size=2)
    samples = [mock_sample(i, Split.TRAIN, config) for i in range(8)]
    role = data_role(chosen, dist.get_rank())
    engine = small_engine(chosen, bf16=bf16, lr=3e-3, steps=steps)
    loader = build_list_loader(samples, config, role, ByteTokenizer())
    for iteration in range(1, steps + 1):
        loss = float(train_step(engine, loader, iteration, 8).loss)
    answers = write_answers(engine, samples, config, role, ByteTokenizer())
    if answers is None:
        return loss, None
    right = {s.key: (*s.answer.encode(), ByteTokenizer.eos_id) for s in samples}
    assert {key: answer.expected for key, answer in answers.items()} == right
    return loss, {key: (answer.expected, answer.generated) for key, answer in answers.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [layout({}, {}), FAN_OUT, beside({}, {"tp": 2}), layout({"dp": 2}, {"tp": 2})],
    ids=["one rank", "fan-out", "llm tp 2", "colocated"],
)
def test_a_learned_batch_is_answered_exactly(
    chosen: Layout, run_ranks: Callable[..., list]
) -> None:
    found = run_ranks(chosen.world_size, learn_and_answer, chosen, False)
    (answers,) = [answers for _, answers in found if answers is not None]
    assert len({expected for expected, _ in answers.values()}) > 3
    for expected, generated in answers.values():
        assert generated == expected


@pytest.mark.slow
def test_bf16_learns_too(run_ranks: Callable[..., list]) -> None:
    found = run_ranks(3, learn_and_answer, FAN_OUT, True)
    assert found[FAN_OUT.logging_rank][0] < 0.05


def encoder_norms(correct: bool) -> float:
    """Of the first step, in which one of two encoder ranks has no image."""
    from megatron_mimo.training.step import train_step

    chosen = beside({"dp": 2}, {"dp": 2})
    engine = small_engine(chosen, seq_length=560, correct=correct)
    # Every other sample has an image, so one of the two lanes has none.
    loader = list_loader(chosen, seq_length=560, micro_batch_size=1, global_batch_size=2)
    return train_step(engine, loader, 1, 2).update.module_norms["encoder"]


def test_gradients_are_scaled_up_for_encoder_ranks_without_images(
    run_ranks: Callable[..., list],
) -> None:
    (plain, *_), (scaled, *_) = (run_ranks(4, encoder_norms, on) for on in (False, True))
    assert plain > 0
    assert scaled == pytest.approx(2 * plain, rel=1e-5)
