"""All that a run has learnt, as whole tensors, whatever the layout.

Adam's first moment is a sum over the steps' gradients, so comparing it compares every gradient of
every weight. What is compared is what a checkpoint would store, by the same names and boxes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

_OPTIMIZER = "optimizer.state."


@dataclass(frozen=True)
class Part:
    """A box of a stored tensor.

    Attributes:
        key: Name of the stored tensor.
        global_shape: Shape of the stored tensor.
        offset: First index of the box along each dimension.
        values: float32 array of the box's shape.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: np.ndarray


def parts_of(engine: Any) -> list[Part]:
    """What this rank owns of weights and moments; copies of tensor-parallel peers too."""
    from megatron_mimo.checkpoint.tensors import optimizer_tensors, writes

    states = engine.optimizer.param_states()
    return [
        Part(
            tensor.key,
            tuple(tensor.global_shape),
            tuple(tensor.global_offset),
            tensor.data.detach().float().numpy().copy(),
        )
        for replica in engine.model.replicas
        for tensor in [*writes(replica, states), *optimizer_tensors(replica, states, reading=True)]
    ]


def assemble(ranks: Iterable[Iterable[Part]]) -> dict[str, np.ndarray]:
    """Whole tensors by name. Ranks that hold the same box must hold the same values."""
    found: dict[str, np.ndarray] = {}
    for part in (part for parts in ranks for part in parts):
        whole = found.setdefault(part.key, np.full(part.global_shape, np.nan, np.float32))
        box = tuple(
            slice(first, first + size)
            for first, size in zip(part.offset, part.values.shape, strict=True)
        )
        known = ~np.isnan(whole[box])
        copies = pytest.approx(whole[box][known], rel=1e-4, abs=1e-6)
        assert part.values[known] == copies, f"copies of {part.key} differ"
        whole[box] = part.values
    holes = {key for key, whole in found.items() if np.isnan(whole).any()}
    assert not holes, f"no rank holds all of {sorted(holes)}"
    return found


def assert_same_state(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    """Every tensor is that of the other run, to 1e-4 of its largest element.

    Where the sum of gradients is nothing but rounding (a key's bias has no gradient), Adam steps by
    the sign of the rounding, so weights are compared where it is more than that.
    """
    assert found.keys() == wanted.keys()
    apart = {}
    for key, values in wanted.items():
        difference = np.abs(found[key] - values)
        weight = key.removeprefix(f"{_OPTIMIZER}fp32_param.")
        moment = wanted.get(f"{_OPTIMIZER}exp_avg.{weight}")
        if moment is not None and not key.startswith(f"{_OPTIMIZER}exp_avg"):
            difference = difference[np.abs(moment) > 1e-4 * np.abs(moment).max()]
        scale = float(np.abs(values).max()) or 1.0
        part = float(difference.max(initial=0.0)) / scale
        if part > 1e-4:
            apart[key] = part
    assert not apart, f"tensors part, as a share of their largest element: {apart}"
