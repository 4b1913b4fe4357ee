"""The rank pool: reuse, isolation, and what a failing, hanging or dying rank shows."""

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.harness import RankPool, RanksFailed, RunRanks


@pytest.fixture(scope="module")
def run() -> Iterator[RunRanks]:
    """A pool of this module's own, so that failures do not make other tests start workers."""
    pool = RankPool()
    yield pool.run
    pool.close()


held: list[dist.ProcessGroup] = []


def describe_rank(offset: int) -> dict[str, object]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return {
        "pid": os.getpid(),
        "rank": dist.get_rank(),
        "world": dist.get_world_size(),
        "environment": (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]),
        "threads": torch.get_num_threads(),
        "sum": total,
    }


def draw_and_leave_traces() -> tuple[float, float, str | None]:
    drawn = (torch.rand(()).item(), random.random(), os.environ.get("LEFT_BEHIND"))
    os.environ["LEFT_BEHIND"] = "yes"
    torch.set_default_dtype(torch.float64)
    return drawn


def subgroup_sum() -> float:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    total = torch.ones(()) * dist.get_rank()
    dist.all_reduce(total, group=groups[dist.get_rank() // 2])
    return total.item()


def hold_groups() -> int:
    """Keep gloo groups for good, as modules with autograd hooks do."""
    held.extend(dist.new_group() for _ in range(40))
    return os.getpid()


def fail_on(rank: int) -> int:
    if dist.get_rank() == rank:
        left, right = 3, 4
        assert left == right, "apples and pears"
    dist.barrier()
    return 0


def fail_on_all() -> None:
    raise KeyError(f"lost on {dist.get_rank()}")


def hang() -> None:
    if dist.get_rank() == 0:
        wait_for_nobody()
    dist.barrier()


def wait_for_nobody() -> None:
    threading.Event().wait()


def leave(rank: int, how: str) -> None:
    if dist.get_rank() == rank:
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def stop_myself() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def return_a_lock() -> object:
    return threading.Lock()


def skip_for_a_reason() -> None:
    pytest.skip("not on this machine")


def grow(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + dist.get_rank()


def imported_engine() -> bool:
    return "megatron.core" in sys.modules


def test_a_rank_finds_its_group_and_environment(run: RunRanks) -> None:
    results = run(3, describe_rank, 10)
    for rank, result in enumerate(results):
        assert (result["rank"], result["world"]) == (rank, 3)
        assert result["environment"] == (str(rank), "3", str(rank))
        assert result["threads"] == 1
        assert torch.equal(result["sum"], torch.tensor([33]))


def test_processes_are_reused_for_every_world_size(run: RunRanks) -> None:
    pids = {size: [r["pid"] for r in run(size, describe_rank, 0)] for size in (2, 4, 1, 3, 2)}
    assert len(set(pids[4])) == 4
    for size, seen in pids.items():
        assert seen == pids[4][:size]
    assert os.getpid() not in pids[4]


def test_a_process_that_hoards_threads_is_replaced(run: RunRanks) -> None:
    hoarders = run(2, hold_groups)
    assert not set(hoarders) & {answer["pid"] for answer in run(2, describe_rank, 0)}


def test_calls_do_not_see_each_other(run: RunRanks) -> None:
    first = run(2, draw_and_leave_traces)
    second = run(2, draw_and_leave_traces)
    assert first == second
    assert first[0] == first[1]
    assert first[0][2] is None


def test_subgroups(run: RunRanks) -> None:
    assert run(4, subgroup_sum) == [1.0, 1.0, 5.0, 5.0]
    assert run(4, subgroup_sum) == [1.0, 1.0, 5.0, 5.0]


def test_tensors_travel(run: RunRanks) -> None:
    big = torch.arange(300_000, dtype=torch.float64)
    results = run(2, grow, big)
    assert torch.equal(results[0], big)
    assert torch.equal(results[1], big + 1)


def test_megatron_core_is_there(run: RunRanks) -> None:
    assert run(1, imported_engine) == [True]


def test_one_failing_rank_shows_its_traceback_and_the_next_call_passes(run: RunRanks) -> None:
    with pytest.raises(RanksFailed) as failure:
        run(3, fail_on, 1)
    text = str(failure.value)
    assert "---- rank 1 failed (first) ----" in text
    assert "apples and pears" in text
    assert "in fail_on\n    assert left == right" in text
    assert "assert 3 == 4" in text  # pytest's rewritten assertion, in the rank
    assert "harness/worker.py" not in text
    for rank in (0, 2):
        assert f"---- rank {rank} was cut, still running in ----" in text
    assert "in barrier" in text
    assert [r["world"] for r in run(3, describe_rank, 0)] == [3, 3, 3]


def test_every_failing_rank_is_shown(run: RunRanks) -> None:
    with pytest.raises(RanksFailed) as failure:
        run(3, fail_on_all)
    for rank in range(3):
        assert f"KeyError: 'lost on {rank}'" in str(failure.value)
    assert str(failure.value).count("(first)") == 1


def test_a_hang_is_cut_and_shows_every_stack(run: RunRanks) -> None:
    with pytest.raises(RanksFailed) as failure:
        run(2, hang, timeout=1.0)
    text = str(failure.value)
    assert text.startswith("hang did not end within its limit of 1 s")
    assert "in wait_for_nobody" in text
    assert "in barrier" in text
    assert run(2, grow, torch.zeros(())) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("how", "words"),
    [("exit", "died: exit code 7"), ("kill", "died: killed by signal 9 (SIGKILL)")],
)
def test_a_dying_rank_is_named(run: RunRanks, how: str, words: str) -> None:
    with pytest.raises(RanksFailed) as failure:
        run(3, leave, 2, how)
    text = str(failure.value)
    first = text.index("---- rank 2 failed (first) ----")
    assert f"rank 2 {words}" in text[first:]
    assert run(3, grow, torch.zeros(())) == [0.0, 1.0, 2.0]


def test_a_stopped_rank_is_cut(run: RunRanks) -> None:
    with pytest.raises(RanksFailed) as failure:
        run(2, stop_myself, timeout=1.0)
    assert "the process was stopped" in str(failure.value)
    assert run(2, grow, torch.zeros(())) == [0.0, 1.0]


def test_a_result_that_cannot_travel_is_a_failure(run: RunRanks) -> None:
    with pytest.raises(RanksFailed, match="return_a_lock returned a lock that cannot be pickled"):
        run(1, return_a_lock)


def test_a_skip_on_all_ranks_skips_the_test(run: RunRanks) -> None:
    with pytest.raises(pytest.skip.Exception, match="not on this machine"):
        run(2, skip_for_a_reason)


def test_a_nested_function_is_refused(run: RunRanks) -> None:
    with pytest.raises(ValueError, match="move it to the top level of the test module"):
        run(1, lambda: 0)


def test_close_ends_all_processes() -> None:
    pool = RankPool()
    pids = [result["pid"] for result in pool.run(2, describe_rank, 0)]
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_session_fixture_runs_ranks(run_ranks: RunRanks) -> None:
    assert run_ranks(2, grow, torch.zeros(())) == [0.0, 1.0]
