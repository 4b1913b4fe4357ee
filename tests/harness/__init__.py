"""A pool of gloo ranks, started once per pytest session and reused by every test.

A test asks for the `run_ranks` fixture and hands it a function of its own module:

    def sum_of_ranks(offset: int) -> int:
        total = torch.tensor(dist.get_rank() + offset)
        dist.all_reduce(total)
        return int(total)

    def test_sum(run_ranks: RunRanks) -> None:
        assert run_ranks(2, sum_of_ranks, 10) == [21, 21]

See `RankPool.run` for what a rank finds when it starts, and what a failure shows.
"""

from tests.harness.pool import RankPool, RanksFailed, RunRanks

__all__ = ["RankPool", "RanksFailed", "RunRanks"]
