"""Training from folders of transformers' families equals transformers with torch's AdamW."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from megatron_mimo.topology import Layout
from tests.hf.models import CONFIGS
from tests.integration.engines import beside, layout

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 6
LAYOUTS: dict[str, Layout] = {
    "one rank": layout({}, {}),
    "llm tp 2 pp 2": beside({}, {"tp": 2, "pp": 2}),
    "2:3": beside({"dp": 2}, {"dp": 3}),
    "llm pp 3": beside({}, {"pp": 3}),
    "colocated": layout({"dp": 2}, {"pp": 2, "dp": 1}),
}
CASES = [(family, name) for family in CONFIGS for name in LAYOUTS]


def saved(name: str, folder: str, batch: int, steps: int, frozen: str = "") -> tuple[Any, Any]:
    """Write a folder, and train from it by transformers."""
    from tests.hf.models import build
    from tests.hf.steps import oracle

    build(name).save_pretrained(folder)
    points, gradients, _ = oracle(name, steps, batch, frozen=frozen)
    return points, gradients


@pytest.fixture(scope="module")
def plain(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family -> its folder, the curve of transformers and the gradients of the first step."""
    found: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in found:
            folder = tmp_path_factory.mktemp("hf") / "folder"
            (result,) = run_ranks(1, saved, name, str(folder), BATCH, 50, timeout=300)
            found[name] = (folder, *result)
        return found[name]

    return of


@pytest.mark.parametrize(("name", "where"), CASES)
def test_every_gradient_of_the_first_step(
    name: str, where: str, run_ranks: Callable[..., list], plain: Any
) -> None:
    from tests.hf.steps import first_gradients

    folder, _, wanted = plain(name)
    chosen = LAYOUTS[where]
    found = run_ranks(
        chosen.world_size, first_gradients, str(folder), name, chosen, BATCH, timeout=120
    )
    assert_gradients(found, wanted)


def assert_gradients(found: "list[dict[str, Tensor]]", wanted: "dict[str, Tensor]") -> None:
    """Every rank has transformers' gradients, and together they have all of them."""
    seen = set()
    for gradients in found:
        for path, gradient in gradients.items():
            if path == "lm_head.weight" and path not in wanted:
                continue  # A tied copy, whose gradient is that of the embedding.
            seen.add(path)
            expected = wanted.get(path)
            if expected is None:
                assert not gradient.any(), path
                continue
            scale = expected.abs().max().item()
            assert (gradient - expected).abs().max().item() <= 1e-4 * scale + 1e-9, path
    assert seen >= set(wanted)


@pytest.mark.parametrize(("name", "where"), CASES)
def test_curves_are_those_of_transformers(
    name: str, where: str, run_ranks: Callable[..., list], plain: Any
) -> None:
    from tests.hf.steps import curve

    folder, wanted, _ = plain(name)
    chosen = LAYOUTS[where]
    curves = run_ranks(
        chosen.world_size, curve, str(folder), name, chosen, len(wanted), BATCH, timeout=300
    )
    for points in curves:
        for step, (found, expected) in enumerate(zip(points, wanted, strict=True)):
            assert found[0] == pytest.approx(expected[0], rel=1e-5), step
            assert found[1] == pytest.approx(expected[1], rel=1e-4), step
