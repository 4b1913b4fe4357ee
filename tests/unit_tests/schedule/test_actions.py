"""Schedules are checked by running all ranks' lists against each other without any process."""

import pytest

from megatron_mimo.schedule.actions import Action, Kind, step_actions

SENDS = {Kind.SEND_ROWS: "rows", Kind.SEND_GRADS: "grads"}
WAITS = {Kind.WAIT_ROWS: "rows", Kind.WAIT_GRADS: "grads"}


def actions(*, encoder: bool, language: bool, num: int = 5, **kwargs: object) -> list[Action]:
    settings = {"run_ahead": 1, "gradients": True, "encoder_trains": True} | kwargs
    return list(step_actions(encoder=encoder, language=language, num_microbatches=num, **settings))


def run_together(*ranks: list[Action]) -> None:
    """Advance every rank until none can; a wait needs its send. All must reach the end."""
    sent: set[tuple[str, int]] = set()
    position = [0] * len(ranks)
    moved = True
    while moved:
        moved = False
        for i, todo in enumerate(ranks):
            while position[i] < len(todo):
                action = todo[position[i]]
                wait = WAITS.get(action.kind)
                if wait and (wait, action.microbatch) not in sent:
                    break
                if action.kind in SENDS:
                    sent.add((SENDS[action.kind], action.microbatch))
                position[i] += 1
                moved = True
    assert position == [len(todo) for todo in ranks]


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("run_ahead", [0, 1, 3, 9])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("encoder_trains", [True, False])
def test_both_sides_reach_the_end(
    num: int, run_ahead: int, gradients: bool, encoder_trains: bool
) -> None:
    settings = {"run_ahead": run_ahead, "gradients": gradients, "encoder_trains": encoder_trains}
    run_together(
        actions(encoder=True, language=False, num=num, **settings),
        actions(encoder=False, language=True, num=num, **settings),
    )
    run_together(actions(encoder=True, language=True, num=num, **settings))


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_the_encoder_is_at_most_run_ahead_microbatches_ahead(run_ahead: int) -> None:
    alive = highest = 0
    for action in actions(encoder=True, language=False, num=8, run_ahead=run_ahead):
        alive += {Kind.ENCODE: 1, Kind.ENCODE_BACKWARD: -1}.get(action.kind, 0)
        highest = max(highest, alive)
    assert alive == 0
    assert highest == run_ahead + 1


def test_the_next_rows_are_asked_for_before_the_forward() -> None:
    todo = actions(encoder=False, language=True)
    assert todo.index(Action(Kind.POST_ROWS, 3)) < todo.index(Action(Kind.FORWARD, 2))


def test_a_frozen_encoder_side_gets_no_gradient() -> None:
    kinds = {
        action.kind
        for side in (True, False)
        for action in actions(encoder=side, language=not side, encoder_trains=False)
    }
    assert not kinds & {Kind.SEND_GRADS, Kind.POST_GRADS, Kind.WAIT_GRADS, Kind.ENCODE_BACKWARD}
    assert Kind.BACKWARD in kinds


def test_evaluation_runs_forward_only() -> None:
    kinds = {a.kind for a in actions(encoder=True, language=True, gradients=False)}
    assert kinds == {Kind.ENCODE, Kind.SEND_ROWS, Kind.POST_ROWS, Kind.WAIT_ROWS, Kind.FORWARD}
