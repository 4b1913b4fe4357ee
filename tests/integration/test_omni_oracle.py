"""Training of vision, video, audio and language on grids equals plain transformers with AdamW."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mimo.topology import balanced
from tests.harness.slices import slow_but
from tests.integration.omni import (
    apart,
    curve,
    exported,
    first_gradients,
    layout,
    oracle,
    resumed,
    through,
)

LAYOUTS = {
    "one rank": layout(("encoder", {}), ("audio", {}), ("llm", {})),
    "disjoint": apart({}, {}, {}),
    "encoders colocated": layout(("encoder", {}), ("audio", {}), ("llm", {"offset": 1})),
    "all colocated, dp 2": layout(("encoder", {"dp": 2}), ("audio", {"dp": 2}), ("llm", {"dp": 2})),
    "2:3:1": apart({"dp": 2}, {"dp": 3}, {}),
    "2:3:2, items shared out": balanced(apart({"dp": 2}, {"dp": 3}, {"dp": 2})),
    "all colocated, dp 2, items shared out": balanced(
        layout(("encoder", {"dp": 2}), ("audio", {"dp": 2}), ("llm", {"dp": 2}))
    ),
    "audio tp 2": apart({}, {"tp": 2}, {}),
    "audio pp 1, llm pp 2": apart({}, {}, {"pp": 2}),
    "llm ep 2, encoders tp 2": apart({"tp": 2}, {"tp": 2}, {"dp": 2, "ep": 2}),
}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "summary_idxs", "correction_bias")
# Of the largest element of each gradient.
TOLERANCE = 1e-4

Found = tuple[Path, list[list[float]]]


@pytest.fixture(scope="module")
def plain(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The folders of the oracle, and its curve."""
    root = tmp_path_factory.mktemp("omni")
    paths = [str(root / name) for name in ("first", "gradients", "trained")]
    (points,) = run_ranks(1, oracle, *paths, timeout=400)
    return root, points


@pytest.mark.parametrize("name", slow_but(LAYOUTS, "disjoint"))
def test_every_gradient_is_that_of_transformers(
    name: str, run_ranks: Callable[..., list], plain: Found
) -> None:
    from safetensors.torch import load_file

    root, _ = plain
    chosen = LAYOUTS[name]
    found: dict = {}
    for of_rank in run_ranks(chosen.world_size, first_gradients, chosen, str(root / "first")):
        found |= of_rank
    wanted = load_file(root / "gradients" / "model.safetensors")
    weights = {key for key, value in wanted.items() if key in found}
    left = sorted(set(wanted) - weights)
    # Buffers have no gradients.
    assert all(key.endswith(BUFFERS) for key in left), left
    assert set(found) == weights
    for key in sorted(weights):
        scale = wanted[key].abs().max().item()
        assert (found[key] - wanted[key]).abs().max().item() <= TOLERANCE * scale, key
        assert scale > 0, key


@pytest.mark.slow
def test_videos_on_a_grid_of_their_own(run_ranks: Callable[..., list], plain: Found) -> None:
    import torch
    from safetensors.torch import load_file

    root, _ = plain
    chosen = layout(
        ("encoder", {}),
        ("video", {"dp": 2, "offset": 1}),
        ("audio", {"offset": 3}),
        ("llm", {"offset": 4}),
    )
    grids = run_ranks(5, first_gradients, chosen, str(root / "first"), True)
    found: dict[str, torch.Tensor] = {}
    # Both encoders hold the weights of one; of the two ranks with videos the first is taken.
    for of_rank in (grids[rank] for rank in (0, 1, 3, 4)):
        for key, gradient in of_rank.items():
            found[key] = found[key] + gradient if key in found else gradient
    wanted = load_file(root / "gradients" / "model.safetensors")
    assert len(set(grids[0]) & set(grids[1])) > 20
    for key, gradient in found.items():
        scale = wanted[key].abs().max().item()
        assert (gradient - wanted[key]).abs().max().item() <= TOLERANCE * scale, key


@pytest.mark.parametrize("name", slow_but(LAYOUTS, "disjoint"))
def test_losses_norms_and_weights_are_those_of_transformers(
    name: str, run_ranks: Callable[..., list], plain: Found, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    root, wanted = plain
    chosen, saved = LAYOUTS[name], str(tmp_path / "saved")
    first = str(root / "first")
    for points in run_ranks(chosen.world_size, curve, chosen, first, saved, timeout=300):
        for step, (found, expected) in enumerate(zip(points, wanted, strict=True)):
            assert found[0] == pytest.approx(expected[0], rel=1e-5), step
            assert found[1] == pytest.approx(expected[1], rel=1e-4), step
    run_ranks(1, exported, first, saved, str(tmp_path / "out"), timeout=120)
    mine = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(root / "trained" / "model.safetensors")
    begun = load_file(root / "first" / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert mine[key].dtype == tensor.dtype and mine[key].shape == tensor.shape, key
        if key.endswith(BUFFERS):
            assert mine[key].equal(tensor), key
            continue
        assert not tensor.equal(begun[key]), key
        difference = (mine[key] - tensor).abs()
        if key.endswith("attn.qkv.bias"):
            # Softmax does not see a bias of all keys, whose gradient is rounding noise.
            queries, _, values = difference.chunk(3)
            difference = max(queries, values, key=lambda part: part.max().item())
        assert difference.max().item() < 1e-4, key


@pytest.mark.parametrize("name", slow_but({"2:3:1": LAYOUTS["2:3:1"]}))
def test_a_run_continues_bit_for_bit_and_on_another_layout(
    name: str, run_ranks: Callable[..., list], plain: Found, tmp_path: Path
) -> None:
    root, wanted = plain
    chosen, first, saved = LAYOUTS[name], str(root / "first"), str(tmp_path / "saved")
    whole = run_ranks(chosen.world_size, through, chosen, first, 6, saved, 3, timeout=300)
    again = run_ranks(chosen.world_size, resumed, chosen, first, saved, 3, 3, timeout=300)
    for (points, weights), (rest, same) in zip(whole, again, strict=True):
        assert rest == points[3:]
        assert same == weights
    other = LAYOUTS["encoders colocated"]
    for points, _ in run_ranks(other.world_size, resumed, other, first, saved, 3, 3, timeout=300):
        for found, expected in zip(points, wanted[3:6], strict=True):
            assert found[0] == pytest.approx(expected[0], rel=1e-5)
            assert found[1] == pytest.approx(expected[1], rel=1e-4)
