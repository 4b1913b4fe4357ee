"""Whole steps over Transformer Engine's layers and optimizer, against host layers on one rank.

What trains, how it is compared and the samples are those of `test_cover`, `test_resume`,
`test_fp16` and of the tests of weights in folders; only the layers are others.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.fused.packages import NEWEST, OLDEST, VERSIONS
from tests.harness.slices import slow_but
from tests.integration import test_fp16, test_resume
from tests.integration.cover import Case, fits, named
from tests.integration.curves import assert_parity
from tests.integration.state import assemble, assert_same_state
from tests.integration.test_cover import train
from tests.unit_tests.modules.hybrid.test_hybrid_lm import compare as compare_hybrid
from tests.unit_tests.modules.radio.test_radio_features import CONFIGS, features
from tests.unit_tests.modules.radio.test_radio_features import gradients as radio_gradients

RunFused = Callable[..., list]

CASES = (
    "colocated",
    "llm dp 2, overlap gradients+weights, recompute selective, llm ep 2",
    "colocated, encoder tp 2, llm tp 2, packed",
    "colocated, packed",
    "colocated, recompute full",
    "colocated, dense",
    "colocated, dense, packed, recompute selective",
    "colocated, encoder tp 2, llm tp 2, dense",
    "colocated, encoder tp 2, llm tp 2, dense tied, no sequence parallel",
    "colocated, encoder tp 2, llm tp 2, dense, packed, no sequence parallel",
    "llm dp 2, llm ep 2, llm tp 2, packed",
    "llm dp 2, llm ep 2, llm tp 2, expt tp 2, overlap gradients",
    "llm pp 2, llm dp 2, llm ep 2, run ahead 3",
    "encoder dp 2, llm pp 2, dense tied, recompute full",
    "frozen vision, llm dp 2, overlap gradients+weights",
    "frozen language, encoder dp 2, packed",
    "llm cp 2, dense",
    "llm cp 2, llm dp 2, dense tied, no sequence parallel, recompute full",
    "llm cp 2, llm ep 2, overlap gradients",
    "llm cp 2, llm tp 2, recompute selective",
    "llm cp 2, packed",
    "encoder cp 2, encoder tp 2, dense, packed",
    "llm cp 2, llm tp 2, dense, packed, recompute full",
)
EVERYDAY = {NEWEST: (CASES[1], "llm cp 2, dense"), OLDEST: (CASES[2],)}
RUNS = [
    pytest.param(version, case, marks=() if case in EVERYDAY[version] else pytest.mark.slow)
    for version in VERSIONS
    for case in CASES
]


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_a_possible_run(name: str) -> None:
    assert fits(asdict(named(name)))


@pytest.fixture(scope="session")
def on_host(run_ranks: Callable[..., list]) -> Callable[[Case], Any]:
    """What one rank with host layers learns of a case's samples; each run is made once."""
    made: dict[Case, Any] = {}

    def reference(case: Case) -> Any:
        if case not in made:
            ((points, held_out, loads, parts),) = run_ranks(1, train, case)
            made[case] = points, held_out, loads, assemble([parts])
        return made[case]

    return reference


@pytest.mark.parametrize(("version", "name"), RUNS)
def test_curve_and_every_gradient_are_those_of_a_host(
    version: str, name: str, run_fused: RunFused, on_host: Callable[[Case], Any]
) -> None:
    # Weights are drawn by name in either run, so this holds names against each other as well.
    case = named(name)
    wanted, wanted_held_out, wanted_loads, wanted_state = on_host(case.reference)
    found = run_fused(version, case.layout.world_size, train, case)
    curves = [(points, held_out) for points, held_out, *_ in found if points]
    assert curves
    for points, held_out in curves:
        assert_parity(wanted, points)
        assert held_out == pytest.approx(wanted_held_out, rel=1e-5)
    for loads in (loads for _, _, loads, _ in found if loads):
        for load, expected in zip(loads, wanted_loads, strict=True):
            assert load[:-1] == expected[:-1]
    assert_same_state(assemble(parts for *_, parts in found), wanted_state)


RESUMED = ("one rank", "llm ep 2", "llm tp 2", "llm pp 2 ep 2", "colocated")


@pytest.mark.parametrize("name", slow_but(RESUMED, "one rank"))
@pytest.mark.parametrize("version", slow_but(VERSIONS, NEWEST))
def test_training_goes_on_bit_for_bit_and_on_a_host_along_the_same_curve(
    version: str, name: str, run_ranks: Callable[..., list], run_fused: RunFused, tmp_path: Path
) -> None:
    chosen, root = test_resume.LAYOUTS[name], str(tmp_path)
    size = chosen.world_size
    before = run_fused(version, size, test_resume.straight, chosen, {}, {}, root, {}, timeout=120)
    after = run_fused(version, size, test_resume.resumed, chosen, {}, {}, root, {}, timeout=120)
    test_resume.assert_exact(before, after)
    on_host = run_ranks(1, test_resume.resumed, test_resume.ONE_RANK, {}, {}, root, {})
    test_resume.assert_same_curve(before, on_host)


@pytest.mark.parametrize("version", slow_but(VERSIONS, NEWEST))
def test_what_a_host_saved_goes_on(
    version: str, run_ranks: Callable[..., list], run_fused: RunFused, tmp_path: Path
) -> None:
    chosen, root = test_resume.ONE_RANK, str(tmp_path)
    started = run_ranks(1, test_resume.straight, chosen, {}, {}, root, {})
    ended = run_fused(version, 1, test_resume.resumed, chosen, {}, {}, root, {})
    test_resume.assert_same_curve(started, ended)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_so_does_bf16_saved_in_the_background(
    version: str, run_fused: RunFused, tmp_path: Path
) -> None:
    chosen, root, engine = test_resume.ONE_RANK, str(tmp_path), {"bf16": True}
    save = {"in_background": True}
    before = run_fused(version, 1, test_resume.straight, chosen, {}, engine, root, save)
    after = run_fused(version, 1, test_resume.resumed, chosen, {}, engine, root, {})
    test_resume.assert_exact(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_float16_changes_nothing_but_rounding(
    version: str, run_ranks: Callable[..., list], run_fused: RunFused
) -> None:
    chosen = test_fp16.LAYOUTS["one rank"]
    (wanted,) = run_ranks(1, test_fp16.train, chosen, False, None)
    (found,) = run_fused(version, 1, test_fp16.train, chosen, True, {"constant": 1024.0})
    for (loss, norm, scale, applied), (wanted_loss, wanted_norm, *_) in zip(
        found, wanted, strict=True
    ):
        assert applied and scale == 1024
        assert loss == pytest.approx(wanted_loss, rel=0.02)
        assert norm == pytest.approx(wanted_norm, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_scale_comes_down_to_what_float16_holds(version: str, run_fused: RunFused) -> None:
    chosen = test_fp16.LAYOUTS["one rank"]
    (found,) = run_fused(version, 1, test_fp16.train, chosen, True, {"initial": 2.0**24})
    skipped = [scale for _, _, scale, applied in found if not applied]
    assert skipped and skipped[0] == 2.0**24
    assert not any(applied for _, _, _, applied in found[: len(skipped)])


@pytest.mark.parametrize("version", slow_but(VERSIONS, OLDEST))
def test_weights_of_folders(version: str, run_fused: RunFused, tmp_path: Path) -> None:
    (differences,) = run_fused(version, 1, features, tmp_path / "radio", CONFIGS["base"])
    assert max(differences) < 1e-5
    (found,) = run_fused(version, 1, radio_gradients, tmp_path / "gradients")
    assert max(found.values()) < 1e-4, found
    (found,) = run_fused(version, 1, compare_hybrid, tmp_path / "hybrid", "ME*-", {}, 37)
    assert found["logits"] < 1e-5
    assert max(found.values()) < 1e-4, found
