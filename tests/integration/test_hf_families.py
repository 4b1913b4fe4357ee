"""Training from folders of transformers' families equals transformers with torch's AdamW."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from megatron_mimo.modules.hf.family import FAMILIES, Family
from megatron_mimo.topology import Layout
from tests.harness.slices import slow_but
from tests.hf.models import CONFIGS
from tests.integration.engines import beside, layout

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 6


@dataclass(frozen=True)
class Row:
    """A way to train: where ranks lie, what is frozen, and how samples become microbatches.

    Attributes:
        layout: Layout of the ranks.
        frozen: Names of the parts that do not train.
        uneven: Whether pipeline stages have other numbers of layers than by their work.
        loader: Arguments of `tests.hf.steps.Steps`.
        build: Arguments of `tests.hf.steps.runner_of`.
    """

    layout: Layout
    frozen: tuple[str, ...] = ()
    uneven: bool = False
    loader: dict[str, int] = field(default_factory=dict)
    build: dict[str, Any] = field(default_factory=dict)

    def takes(self, name: str) -> bool:
        """Whether a family can train so; what cannot is refused, see `test_hf_refusals.py`."""
        llm = self.layout.target
        if name == "gemma4 e-series" and max(llm.tp, llm.pp) > 1:
            return False
        return llm.ep == 1 or name.endswith("moe")


PACKED = {"documents": 2, "length": 96}
ROWS: dict[str, Row] = {
    "one rank": Row(layout({}, {})),
    "llm tp 2 pp 2": Row(beside({}, {"tp": 2, "pp": 2})),
    "2:3": Row(beside({"dp": 2}, {"dp": 3})),
    "llm pp 3": Row(beside({}, {"pp": 3})),
    "colocated": Row(layout({"dp": 2}, {"pp": 2, "dp": 1})),
    "fan in": Row(beside({"dp": 3}, {})),
    "fan out": Row(beside({}, {"dp": 3})),
    "uneven pp 3": Row(beside({}, {"pp": 3}), uneven=True),
    "frozen tower": Row(beside({"dp": 2}, {"pp": 2}), frozen=("vision",)),
    "frozen encoder": Row(beside({}, {"tp": 2}), frozen=("vision", "projector")),
    "frozen language model": Row(beside({}, {"pp": 2}), frozen=("language",)),
    "micro-batch 2": Row(beside({}, {"pp": 2}), loader={"micro": 2}),
    "encoder tp 2": Row(beside({"tp": 2}, {"tp": 2})),
    "encoder tp 2 dp 2": Row(beside({"tp": 2, "dp": 2}, {})),
    "ep 2": Row(beside({}, {"dp": 2, "ep": 2})),
    "ep 2 tp 2": Row(beside({}, {"dp": 2, "ep": 2, "tp": 2, "expt_tp": 2})),
    "ep 2 pp 2": Row(beside({}, {"dp": 2, "ep": 2, "pp": 2})),
    "packed": Row(layout({}, {}), loader=PACKED),
    "packed, llm tp 2 pp 2": Row(beside({}, {"tp": 2, "pp": 2}), loader=PACKED),
    "packed, 2:3": Row(beside({"dp": 2}, {"dp": 3}), loader=PACKED),
    "packed, recomputed": Row(beside({}, {"pp": 2}), loader=PACKED, build={"recompute": True}),
}
UNEVEN = {"gemma4": "1,2,3", "qwen3_vl": "3,1,2"}
CASES = [(name, row) for name in CONFIGS for row in ROWS if ROWS[row].takes(name)]
FEW = ("one rank", "llm tp 2 pp 2", "2:3", "llm pp 3", "colocated", "ep 2 tp 2")
FEW_CASES = [(name, row) for name, row in CASES if row in FEW]
STEPS = 50


def saved(name: str, folder: str, steps: int) -> tuple[Any, Any]:
    """Write a folder, and train from it by transformers."""
    from tests.hf.models import build
    from tests.hf.steps import oracle

    build(name).save_pretrained(folder)
    points, gradients, _ = oracle(name, steps, BATCH)
    return points, gradients


@pytest.fixture(scope="module")
def plain(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(Family, steps) -> its folder, transformers' curve and the gradients of the first step."""
    found: dict[tuple[str, int], Any] = {}

    def of(name: str, steps: int) -> Any:
        if (name, steps) not in found:
            folder = tmp_path_factory.mktemp("hf") / "folder"
            (result,) = run_ranks(1, saved, name, str(folder), steps, timeout=300)
            found[name, steps] = (str(folder), *result)
        return found[name, steps]

    return of


def family_of(name: str) -> Family:
    """The record of a tiny model."""
    return FAMILIES["gemma4" if name.startswith("gemma4") else name.replace(" ", "_")]


def part_of(path: str, family: Family) -> str:
    """The part that a weight belongs to."""
    if path.startswith(("model.language_model", "lm_head")):
        return "language"
    return "projector" if path.startswith(family.projector) else "vision"


@pytest.mark.parametrize(
    "case",
    slow_but(CASES, ("gemma4 moe", "ep 2 pp 2"), ("qwen3_5", "packed"), ("qwen3_vl", "2:3")),
    ids=" on ".join,
)
def test_every_gradient_of_the_first_step(
    case: tuple[str, str], run_ranks: Callable[..., list], plain: Any
) -> None:
    from tests.hf.steps import called, first_gradients

    name, where = case
    row = ROWS[where]
    folder, _, wanted = plain(name, 1)
    sizes = UNEVEN.get(name.split()[0], "1,1,2")
    named = {
        "frozen": row.frozen,
        "overrides": (f"language.stage_layers={sizes}",) if row.uneven else (),
        "build": row.build,
        **row.loader,
    }
    arguments = (folder, name, row.layout, BATCH)
    found = run_ranks(row.layout.world_size, called, first_gradients, arguments, named, timeout=120)
    trains = {
        path: gradient
        for path, gradient in wanted.items()
        if part_of(path, family_of(name)) not in row.frozen
    }
    assert_gradients(found, trains)


def assert_gradients(found: "Iterable[dict[str, Tensor]]", wanted: "dict[str, Tensor]") -> None:
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


@pytest.mark.parametrize("case", slow_but(FEW_CASES), ids=" on ".join)
def test_curves_are_those_of_transformers(
    case: tuple[str, str], run_ranks: Callable[..., list], plain: Any
) -> None:
    from tests.hf.steps import curve

    name, where = case
    folder, wanted, _ = plain(name, STEPS)
    chosen = ROWS[where].layout
    curves = run_ranks(chosen.world_size, curve, folder, name, chosen, STEPS, BATCH, timeout=300)
    for points in curves:
        for step, (found, expected) in enumerate(zip(points, wanted, strict=True)):
            assert found[0] == pytest.approx(expected[0], rel=1e-5), step
            assert found[1] == pytest.approx(expected[1], rel=1e-4), step


@pytest.mark.parametrize("case", slow_but(FEW_CASES), ids=" on ".join)
def test_the_loss_depends_on_the_encoder(
    case: tuple[str, str], run_ranks: Callable[..., list], plain: Any
) -> None:
    """A tower that never ran, or whose rows are lost, would train as well on text."""
    from tests.hf.steps import losses_without_rows

    name, where = case
    folder, curve, _ = plain(name, 1)
    chosen = ROWS[where].layout
    # The last rank holds the last stage, which has the loss.
    *_, (whole, without) = run_ranks(
        chosen.world_size, losses_without_rows, folder, name, chosen, BATCH
    )
    assert whole == pytest.approx(curve[0][0], rel=1e-5)
    # Ten times what the loss may be off by.
    assert abs(without - whole) > 1e-4 * whole


@pytest.mark.parametrize("name", slow_but(["gemma4", "qwen3_vl", "qwen3_vl moe"], "gemma4"))
def test_a_tied_head_is_a_marked_copy_on_the_last_stage(
    name: str, run_ranks: Callable[..., list], plain: Any
) -> None:
    from tests.hf.steps import heads

    folder, curve, _ = plain(name, 1)
    chosen = beside({}, {"pp": 2})
    encoder, first, last = run_ranks(chosen.world_size, heads, folder, name, chosen, BATCH)
    embedding, head = "model.model.language_model.embed_tokens.weight", "model.lm_head.weight"
    # megatron-core leaves out of the norm what is `shared`.
    assert encoder["marks"] == {}
    assert first["marks"] == {embedding: (False, True)}
    assert last["marks"] == {head: (True, True)}
    for found in (encoder, first, last):
        assert found["point"] == pytest.approx(curve[0], rel=1e-5)
    assert first["weight"] == last["weight"]
