"""Stages and shards of the encoder against the whole of it on one rank."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from megatron_mimo.model.config import Frozen
from megatron_mimo.topology import Layout, ModuleGridSpec
from tests.unit_tests.model.by_hand import WIDTH, assert_close

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_mimo.media.images import PackedImages

Found = tuple["Tensor | None", dict[str, "Tensor"]]
GRIDS = ((4, 6), (2, 2), (6, 4))
NUM_ROWS = sum(height * width for height, width in GRIDS) // 4


def colocated(**sizes: int) -> Layout:
    """The encoder's grid, and the language model over the same ranks."""
    encoder = ModuleGridSpec(name="encoder", **sizes)
    llm = ModuleGridSpec(name="llm", dp=encoder.size)
    return Layout.of(encoder, llm, world_size=encoder.size)


def packed_images() -> "PackedImages":
    """Noise, the same on every rank."""
    import numpy as np

    from megatron_mimo.media.images import EncodedImage, pack_images
    from tests.unit_tests.model.by_hand import small_config

    random, config = np.random.default_rng(4), small_config().part("vision").image_config()
    images = [
        EncodedImage((grid,), 0, random.integers(0, 256, (grid[0] * grid[1], 12), dtype=np.uint8))
        for grid in GRIDS
    ]
    packed = pack_images(images, config)
    assert packed is not None
    return packed


def step(layout: Layout, frozen: Frozen) -> Found:
    """Rows of the last stage, and gradients of a weighted sum of them, finalised."""
    import torch

    from megatron_mimo.optim.mimo_optimizer import finalize_gradients
    from megatron_mimo.topology.groups import build_topology
    from tests.unit_tests.model.by_hand import run_stage, small_model, whole_gradients

    model = small_model(build_topology(layout), frozen=frozen)
    encoder = model.modules["encoder"]
    images = packed_images()
    rows: list[Tensor] = []

    def compute(hidden: "Tensor | None") -> "Tensor":
        output = encoder(images, hidden)
        if not encoder.groups.is_last_stage:
            return output
        rows.append(output.detach())
        return (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()

    run_stage(encoder, compute, images.num_tokens, None)
    finalize_gradients(model, 1)
    return rows[0] if rows else None, whole_gradients(encoder)


@pytest.mark.parametrize(
    "frozen",
    [Frozen(), Frozen({"vision"}), Frozen({"projector"})],
    ids=["all trains", "frozen vision", "frozen projector"],
)
@pytest.mark.parametrize("sizes", [{"pp": 2}, {"tp": 2}, {"pp": 4}, {"tp": 2, "pp": 2}], ids=str)
def test_rows_and_gradients_are_those_of_one_rank(
    run_ranks: Callable[..., list], sizes: dict[str, int], frozen: Frozen
) -> None:
    ((wanted_rows, wanted),) = run_ranks(1, step, colocated(), frozen)
    assert wanted_rows.shape == (NUM_ROWS, WIDTH)
    assert {name.partition(".")[0] for name in wanted} == {
        part for part in ("vision", "projector") if part not in frozen
    }
    layout = colocated(**sizes)
    ranks: list[Found] = run_ranks(layout.world_size, step, layout, frozen)
    grid = layout.modules["encoder"]
    for rank, (rows, gradients) in enumerate(ranks):
        last = grid.coordinates(rank).pp == grid.pp - 1
        assert (rows is not None) == last
        if rows is not None:
            assert_close(rows, wanted_rows, "rows")
        if "vision" in frozen and not last:
            assert not gradients
        for name, gradient in gradients.items():
            assert_close(gradient, wanted[name], name)
    assert set().union(*(gradients for _, gradients in ranks)) == set(wanted)
