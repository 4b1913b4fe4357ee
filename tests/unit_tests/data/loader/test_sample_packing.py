import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.loader.packing import pack, plan_round

LENGTHS = st.lists(st.integers(0, 100), max_size=60)
CAPACITY = 100


def first_fit_decreasing(lengths: list[int], capacity: int, started: int = 0) -> int:
    """Groups that the textbook's algorithm makes."""
    rooms = [capacity - sum(lengths[:started])] if started else []
    for length in sorted(lengths[started:], reverse=True):
        for group, room in enumerate(rooms):
            if length <= room:
                rooms[group] -= length
                break
        else:
            rooms.append(capacity - length)
    return len(rooms)


def start_of(lengths: list[int], wanted: int) -> int:
    """How many of the first samples fit one group, at most as many as wanted."""
    while sum(lengths[:wanted]) > CAPACITY:
        wanted -= 1
    return min(wanted, len(lengths))


@given(LENGTHS, st.integers(0, 10))
def test_groups_are_few_and_hold_every_sample_once(lengths: list[int], wanted: int) -> None:
    started = start_of(lengths, wanted)
    groups = pack(lengths, CAPACITY, started)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(groups)
    for group in groups:
        assert sum(lengths[i] for i in group) <= CAPACITY
        assert list(group) == sorted(group)
    assert set(range(started)) <= set(groups[0] if groups else ())
    assert len(groups) <= first_fit_decreasing(lengths, CAPACITY, started)
    assert pack(lengths, CAPACITY, started) == groups


def test_first_fit_steps_in_where_best_fit_needs_more() -> None:
    """Best fit decreasing alone makes three groups of these."""
    assert pack([20, 12, 11, 6, 5, 4, 2], 30) == [(0, 3, 5), (1, 2, 4, 6)]


def test_a_sample_goes_where_it_leaves_least_room() -> None:
    assert pack([60, 70, 30, 40], 100) == [(1, 2), (0, 3)]


@pytest.mark.parametrize(
    ("lengths", "started", "message"),
    [
        ([101], 0, "of 101 to 101"),
        ([60, 50], 2, "110 tokens of them together"),
        ([-1, 5], 0, "of -1"),
    ],
)
def test_what_does_not_fit_is_an_error(lengths: list[int], started: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(lengths, CAPACITY, started)


@given(LENGTHS.filter(bool), st.integers(0, 10))
def test_a_round_holds_the_emptiest_new_group_back(lengths: list[int], wanted: int) -> None:
    started = start_of(lengths, wanted)
    done = plan_round(lengths, CAPACITY, started)
    groups = [*done.leaving, *([done.held] if done.held else [])]
    assert sorted(groups) == sorted(pack(lengths, CAPACITY, started))
    assert list(done.leaving) == sorted(done.leaving) != []
    assert not set(done.held) & set(range(started))
    if done.held:
        held = sum(lengths[i] for i in done.held)
        for group in done.leaving:
            assert held <= sum(lengths[i] for i in group) or set(range(started)) <= set(group)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200), st.integers(1, 20))
def test_no_sample_waits_longer_than_a_round(lengths: list[int], size: int) -> None:
    waiting: list[int] = []
    held_before: set[int] = set()
    source = iter(range(len(lengths)))
    while len(waiting) < size and (new := next(source, None)) is not None:
        waiting.append(new)
    while waiting:
        done = plan_round([lengths[i] for i in waiting], CAPACITY, len(held_before))
        held = [waiting[i] for i in done.held]
        assert not held_before & set(held)
        held_before, waiting = set(held), held
        while len(waiting) < size and (new := next(source, None)) is not None:
            waiting.append(new)


@pytest.mark.parametrize("buffer", [128, 1024])
def test_realistic_lengths_fill_their_sequences(buffer: int) -> None:
    """Log-normal with a mean of 700 tokens, and some as long as the sequence."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.normal(np.log(700) - 0.5, 1.0, 40 * buffer)).astype(int).clip(4, 8192)
    lengths = np.where(random.random(len(lengths)) < 0.02, 8192 - lengths % 1000, lengths)
    waiting: list[int] = []
    started, used, sequences = 0, 0, 0
    for length in lengths.tolist():
        waiting.append(length)
        if len(waiting) == buffer:
            done = plan_round(waiting, 8192, started)
            sequences += len(done.leaving)
            used += sum(waiting[i] for group in done.leaving for i in group)
            waiting = [waiting[i] for i in done.held]
            started = len(waiting)
    assert used / (sequences * 8192) > 0.99
