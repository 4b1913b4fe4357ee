"""Python objects of all ranks on one."""

from collections.abc import Callable
from typing import Any

import pytest


def _gathered() -> list[Any]:
    import torch.distributed as dist

    from megatron_mimo.runtime.gather import gather_to_first

    size = dist.get_world_size()
    assert dist.group.WORLD is not None
    last = dist.new_group(list(range(1, size)))
    found = [gather_to_first({"rank": dist.get_rank()}, dist.group.WORLD)]
    if dist.get_rank() > 0:
        found.append(gather_to_first("x" * dist.get_rank(), last))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_values_come_in_the_order_of_the_ranks(size: int, run_ranks: Callable[..., Any]) -> None:
    first, *others = run_ranks(size, _gathered)
    assert first == [[{"rank": rank} for rank in range(size)]]
    assert others[0] == [[], ["x" * rank for rank in range(1, size)]]
    assert all(found == [[], []] for found in others[1:])
