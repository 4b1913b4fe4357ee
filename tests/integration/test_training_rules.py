"""What must always hold: frozen parts stay, vision counts, bad gradients change nothing."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_mimo.model.config import Frozen
from megatron_mimo.topology import Layout
from tests.integration.engines import (
    beside,
    layout,
    list_loader,
    mock_data,
    mock_loader,
    small_runner,
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


def moved_parts(chosen: Layout, freeze: Frozen) -> set[str]:
    """Train two steps; the parts whose parameters changed on this rank."""
    import torch

    from megatron_mimo.training.step import train_step

    engine = small_runner(chosen, freeze=freeze)
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
        (Frozen(), {"vision", "projector", "model"}),
        (Frozen({"vision"}), {"projector", "model"}),
        (Frozen({"vision", "language"}), {"projector"}),
        (Frozen({"vision", "projector"}), {"model"}),
    ],
    ids=["all train", "vision frozen", "projector alone", "encoder side frozen"],
)
def test_exactly_what_is_not_frozen_moves(
    freeze: Frozen, trains: set[str], run_ranks: Callable[..., list]
) -> None:
    encoder, *lanes = run_ranks(3, moved_parts, FAN_OUT, freeze)
    assert encoder == trains - {"model"}
    assert lanes == [trains & {"model"}] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("freeze", "trains"),
    [
        (Frozen({"vision"}), {"projector", "model"}),
        (Frozen({"vision", "language"}), {"projector"}),
        (Frozen({"language"}), {"vision", "projector"}),
        (Frozen({"vision", "projector"}), {"model"}),
    ],
    ids=["vision frozen", "projector alone", "language frozen", "encoder side frozen"],
)
def test_frozen_stages_and_shards_hold_nobody_up(
    freeze: Frozen, trains: set[str], run_ranks: Callable[..., list]
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
    from megatron_mimo.modules.language import module
    from megatron_mimo.training.step import train_step

    engine = small_runner(chosen)
    loader = mock_loader(chosen, mock_data())
    merge, module.merge_rows = module.merge_rows, lambda text, rows, _: text + 0 * rows.sum()
    try:
        train_step(engine, loader, 1, 8)
    except RuntimeError as error:
        return str(error)
    finally:
        module.merge_rows = merge
    return ""


def test_a_trainable_encoder_without_gradient_stops_the_run(run_ranks: Callable[..., list]) -> None:
    for message in run_ranks(3, step_without_rows, FAN_OUT):
        assert "the gradient of encoder, which is to train, is zero" in message


def step_with_broken_weight(chosen: Layout) -> tuple[bool, bool, float]:
    """One step with an infinite weight: (applied, parameters changed, learning rate moved)."""
    import torch

    from megatron_mimo.training.step import train_step

    engine = small_runner(chosen)
    loader = mock_loader(chosen, mock_data())
    if engine.model.target is not None:
        # Of both replicas: they must stay equal for the comparison below.
        engine.model.target.module.model.output_layer.weight.data[3, 3] = float("inf")
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


class Recorder:
    """Checkpoints that only note when they are asked for."""

    def __init__(self) -> None:
        self.saved: list[int] = []

    def is_due(self, iteration: int) -> bool:
        return True

    def save(self, progress, loader) -> None:
        self.saved.append(progress.iteration)

    def poll(self) -> None: ...

    def finish(self) -> None:
        self.saved.append(-1)

    def close(self) -> None: ...


def run_that_breaks(chosen: Layout, bad: dict[int, int], train_iters: int) -> tuple[str, list[int]]:
    """Train with a loss that is nan on lane 0 in some iterations: the error, and what was saved.

    Args:
        chosen: Layout of the run.
        bad: First iteration with such a loss -> last one, of each row.
        train_iters: Length of the run.
    """
    from megatron_mimo.config.loop_config import StopConfig
    from megatron_mimo.training import step as step_module
    from megatron_mimo.training.loop import LoopConfig, train

    engine, recorder = small_runner(chosen), Recorder()
    loader = mock_loader(chosen, mock_data())
    run, seen = step_module._run, [0]

    def poisoned(runner, data, *args, **settings):
        seen[0] += 1
        loss = run(runner, data, *args, **settings)
        target = runner.topology.target
        is_bad = any(first <= seen[0] <= last for first, last in bad.items())
        return loss * float("nan") if is_bad and target and target.place.dp == 0 else loss

    step_module._run = poisoned
    try:
        train(
            engine,
            loader,
            lambda: loader,
            LoopConfig(
                train_iters=train_iters,
                global_batch_size=8,
                log_interval=100,
                stop=StopConfig(max_nonfinite_steps=3),
            ),
            None,
            recorder,
        )
    except RuntimeError as error:
        return str(error), recorder.saved
    finally:
        step_module._run = run
    return "", recorder.saved


def test_a_loss_that_stays_not_finite_ends_the_run_on_every_rank(
    run_ranks: Callable[..., list],
) -> None:
    # Rows of two are endured; of the third row, the third step is too much.
    found = run_ranks(3, run_that_breaks, FAN_OUT, {2: 3, 5: 6, 8: 30}, 20)
    assert len({message for message, _ in found}) == 1
    for message, saved in found:
        assert message.startswith("iteration 10: loss nan, gradient norm ")
        assert "the last 3 steps were not finite (--max-nonfinite-steps 3)" in message
        assert "weights are those of iteration 7" in message
        assert saved == [1, 4, 7, -1], "only steps that were applied are saved"


def losses_of_a_step(chosen: Layout) -> tuple[float, float]:
    """The mean loss that the language model's last stage has, and that all ranks agreed on."""
    from megatron_mimo.training.step import train_step

    engine = small_runner(chosen)
    step = train_step(engine, mock_loader(chosen, mock_data()), 1, 8)
    return float(step.loss) if engine.topology.target is not None else 0.0, step.agreed_loss


def test_ranks_agree_on_the_loss_whatever_copies_they_hold(run_ranks: Callable[..., list]) -> None:
    found = run_ranks(3, losses_of_a_step, layout({}, {"tp": 2, "offset": 1}))
    assert found[1][0] > 1
    for _, agreed in found:
        assert agreed == pytest.approx(found[1][0], rel=1e-6)


def test_a_run_does_not_end_well_with_a_loss_that_is_not_finite(
    run_ranks: Callable[..., list],
) -> None:
    ((message, saved),) = run_ranks(1, run_that_breaks, layout({}, {}), {4: 4}, 4)
    assert "iteration 4: loss nan" in message and "the last step was not finite" in message
    assert saved == [1, 2, 3, -1]


def losses_with_other_images(chosen: Layout) -> tuple[float, float]:
    """Evaluate one batch as it is, and with its images replaced by noise."""
    import dataclasses

    import torch

    from megatron_mimo.training.step import evaluate

    engine = small_runner(chosen)
    step = mock_loader(chosen, mock_data()).next_step()

    def with_noise(images, noise):
        patches = torch.randn(images.patches.shape, generator=noise)
        return dataclasses.replace(images, patches=patches)

    noise = torch.Generator().manual_seed(1)
    other = dataclasses.replace(
        step,
        microbatches=tuple(
            m
            if not m.inputs
            else dataclasses.replace(m, inputs={"encoder": with_noise(m.inputs["encoder"], noise)})
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

    from megatron_mimo.data import ByteTokenizer, build_list_loader, data_role
    from megatron_mimo.data.samples.mock import Split, mock_sample
    from megatron_mimo.training.exact_match import write_answers
    from megatron_mimo.training.step import train_step

    steps, config = 60, mock_data(micro_batch_size=2)
    samples = [mock_sample(i, Split.TRAIN, config) for i in range(8)]
    role = data_role(chosen, dist.get_rank())
    engine = small_runner(chosen, bf16=bf16, lr=3e-3, steps=steps)
    loader = build_list_loader(samples, config, role, ByteTokenizer())
    for iteration in range(1, steps + 1):
        loss = float(train_step(engine, loader, iteration, 8).loss)
    answers = write_answers(engine, samples, config, role, ByteTokenizer())
    # As a run that packs samples asks: with a sequence for each, of another length.
    packed = replace(
        config,
        micro_batch_size=1,
        provider="energon",
        path="/nowhere",
        packing_buffer_size=8,
        seq_length=config.seq_length + 16,
    )
    assert write_answers(engine, samples, packed, role, ByteTokenizer()) == answers
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
    engine = small_runner(chosen, seq_length=560, correct=correct)
    # Every other sample has an image, so one of the two lanes has none.
    loader = list_loader(chosen, seq_length=560, micro_batch_size=1, global_batch_size=2)
    return train_step(engine, loader, 1, 2).update.module_norms["encoder"]


def test_gradients_are_scaled_up_for_encoder_ranks_without_images(
    run_ranks: Callable[..., list],
) -> None:
    (plain, *_), (scaled, *_) = (run_ranks(4, encoder_norms, on) for on in (False, True))
    assert plain > 0
    assert scaled == pytest.approx(2 * plain, rel=1e-5)
