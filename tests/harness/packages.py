"""Ranks over packages that lie beside the environment, beside the pool of ranks without them.

What is installed for a version stays in a process for its life, so each version has a pool of its
own. Its ranks are forked from a process that has imported the package.
"""

from collections.abc import Callable
from typing import Any

from tests.harness.pool import RankPool, RanksFailed


class NotFetched(Exception):
    """A package that a test asks for is not where the Makefile puts it."""


class PackagePools:
    """Pools of ranks, one for each version that a test has asked for. Close them at the end.

    Args:
        variable: Environment variable that tells `preload` which version ranks have.
        check: Raises `NotFetched` where a version is not there.
    """

    def __init__(self, variable: str, check: Callable[[str], Any]) -> None:
        self._variable = variable
        self._check = check
        self._pools: dict[str, RankPool] = {}

    def run(
        self,
        version: str,
        world_size: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 60.0,
    ) -> list[Any]:
        """`RankPool.run` on ranks that have a version.

        Raises:
            RanksFailed: a rank raised, died or hung, or the version has not been fetched.
        """
        __tracebackhide__ = True
        try:
            self._check(version)
        except NotFetched as error:
            raise RanksFailed(str(error)) from None
        if version not in self._pools:
            self._pools[version] = RankPool({self._variable: version})
        return self._pools[version].run(world_size, fn, *args, timeout=timeout)

    def close(self) -> None:
        """Kill all workers."""
        for pool in self._pools.values():
            pool.close()
