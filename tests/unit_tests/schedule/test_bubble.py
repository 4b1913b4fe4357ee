"""The warning of pipelines with more stages than microbatches."""

import pytest

from megatron_mimo.schedule.bubble import bubble, few_microbatches


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 2), (3, 7)])
def test_enough_microbatches_need_no_warning(stages: int, microbatches: int) -> None:
    assert few_microbatches("--llm-pp", stages, microbatches) is None


def test_a_warning_says_how_much_of_a_step_is_lost() -> None:
    assert few_microbatches("--llm-pp", 4, 1) == (
        "warning: 1 microbatch a step with --llm-pp 4: every stage has nothing to do in 75% of it; "
        "raise --global-batch-size, or lower --llm-pp or --micro-batch-size"
    )


def test_a_bubble_is_the_time_of_the_first_and_last_passes() -> None:
    # 3 stages: the last one begins 2 passes late, of 4 + 2.
    assert bubble(3, 4) == pytest.approx(1 / 3)
