"""Which steps count as not finite, and what the end of the run says."""

import math
from collections.abc import Callable, Sequence

import pytest

# Gradient norm, loss, and whether the loss scale can fall.
Step = tuple[float, float, bool]
GOOD, BAD = (1.0, 2.0, False), (math.inf, 2.0, False)
FALLING = (math.inf, 2.0, True)


def verdict(steps: Sequence[Step], most: int) -> tuple[bool, bool, str]:
    """After steps from iteration 101 on: whether the last counts, the row is full; the error."""
    import torch

    from megatron_mimo.optim.mimo_optimizer import Update
    from megatron_mimo.training.nonfinite import NonfiniteRow
    from megatron_mimo.training.step import StepMetrics

    row = NonfiniteRow(most, 100)
    for iteration, (norm, loss, scale_falls) in enumerate(steps, start=101):
        update = Update(
            applied=math.isfinite(norm) and math.isfinite(loss),
            grad_norm=norm,
            module_norms={"encoder": 0.5, "llm": norm},
            num_zeros=None,
            loss_scale=1.0,
            scale_falls=scale_falls,
        )
        step = StepMetrics(
            loss=torch.tensor(loss),
            learning_rate=0.1,
            update=update,
            experts=None,
            agreed_loss=loss,
        )
        row.note(iteration, step)
    try:
        row.require_none()
    except RuntimeError as error:
        return bool(row), row.is_full, str(error)
    return bool(row), row.is_full, ""


@pytest.fixture
def judge(run_ranks: Callable[..., list]) -> Callable[..., tuple[bool, bool, str]]:
    return lambda *steps, most=3: run_ranks(1, verdict, steps, most)[0]


def test_steps_count_until_one_is_applied(judge: Callable[..., tuple[bool, bool, str]]) -> None:
    assert judge() == judge(GOOD) == judge(BAD, BAD, GOOD) == (False, False, "")
    for bad in (BAD, (1.0, math.nan, False), (1.0, math.inf, False)):
        assert judge(bad)[:2] == (True, False)
        assert judge(bad, bad, GOOD, bad, bad)[:2] == (True, False)
        assert judge(GOOD, bad, bad, bad)[:2] == (True, True)
        assert judge(bad, most=1)[:2] == (True, True)


def test_a_scale_that_can_fall_mends_gradients_but_not_a_loss(
    judge: Callable[..., tuple[bool, bool, str]],
) -> None:
    assert judge(*[FALLING] * 50) == (False, False, "")
    assert judge(FALLING, BAD, BAD, BAD)[:2] == (True, True), "the scale is at its least"
    assert judge(*[(math.inf, math.nan, True)] * 3)[:2] == (True, True)


def test_the_error_names_iteration_and_values(
    judge: Callable[..., tuple[bool, bool, str]],
) -> None:
    assert judge(GOOD, BAD, BAD, BAD)[2].startswith(
        "iteration 104: loss 2, gradient norm inf (encoder 0.5, llm inf): the last 3 steps were "
        "not finite (--max-nonfinite-steps 3), so weights are those of iteration 101, and nothing "
        "was saved since."
    )
