"""What adapters learn must not depend on the layout, and weights beside them must not change."""

import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.fused.packages import NEWEST, VERSIONS
from tests.harness.slices import slow_but
from tests.integration.cover import Case, named
from tests.integration.curves import assert_parity
from tests.integration.state import assemble, assert_same_state
from tests.integration.test_cover import train, train_in_strict_groups

# Every linear layer of the language model and of the vision encoder; the projector trains whole.
HYBRID = frozenset(
    {
        *("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
        *("shared_experts.linear_fc1", "shared_experts.linear_fc2"),
    }
)
DENSE = frozenset({"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"})
LORA = {"rank": 3, "alpha": 7.0}
LAYOUTS = (
    "encoder tp 2, llm tp 2, llm pp 2",
    "llm dp 2, encoder dp 2, colocated, recompute full, dense tied, packed",
    "llm dp 2, llm ep 2, recompute selective, overlap gradients+weights, run ahead 3",
    "encoder dp 2, llm tp 2, llm cp 2, llm ep 2, expt tp 2, text only",
    "llm first, encoder tp 2, encoder pp 2, llm tp 2, dense, no sequence parallel",
    "llm dp 3, encoder dp 2, dense, llm first, text only, check bridge",
    "llm pp 2, llm tp 2, dense tied, recompute full, text only",
    "encoder cp 2, encoder pp 2, dense, text only",
    "frozen vision, llm tp 2, llm pp 2, recompute full",
    "frozen vision, colocated, encoder tp 2, llm dp 2, dense, recompute full",
)
FUSED = (
    "llm tp 2, encoder tp 2",
    "llm dp 2, llm ep 2, recompute selective, overlap gradients+weights",
    "llm pp 2, encoder tp 2, llm tp 2, dense tied, no sequence parallel",
    "llm pp 2, dense, packed, recompute full",
    "llm cp 2, llm tp 2, dense",
)


def targets_of(case: Case) -> dict[str, frozenset[str]]:
    language = HYBRID if case.model == "hybrid" else DENSE
    vision = {} if "vision" in case.frozen else {"vision": DENSE}
    return {"language": language, **vision}


def learn(case: Case, strict: bool, targets: dict[str, frozenset[str]] | None = None) -> Any:
    """What a rank finds, with adapters of some layers, or all."""
    run = train_in_strict_groups if strict else train
    return run(case, begin=away_from_zero, lora={**LORA, "targets": targets or targets_of(case)})


def away_from_zero(engine: Any) -> None:
    """Draw the second factors too, so that the first gradients of both are not zero."""
    import torch

    from megatron_mimo.modules.lora.apply import lora_adapters
    from megatron_mimo.weights.shards import full_shape, take_shard

    for replica in engine.model.replicas:
        group = replica.groups.pg_collection.tp
        for path, adapter in lora_adapters(replica.module):
            weight = adapter.lora_B
            random = torch.Generator().manual_seed(zlib.crc32(path.encode()))
            whole = 0.1 * torch.randn(full_shape(weight, group.size()), generator=random)
            with torch.no_grad():
                weight.copy_(take_shard(whole, weight, tp_rank=group.rank(), tp_size=group.size()))
    engine.optimizer.refresh_main_params()


@pytest.fixture(scope="module")
def one_rank(run_ranks: Callable[..., list]) -> Callable[..., Any]:
    """What one rank learns of a case's samples; each run is made once."""

    @cache
    def reference(case: Case, layer: str | None = None) -> Any:
        targets = {"language": frozenset({layer})} if layer else None
        ((points, held_out, _, parts),) = run_ranks(1, learn, case, False, targets)
        return points, held_out, assemble([parts])

    return reference


@pytest.mark.parametrize("name", slow_but(LAYOUTS, LAYOUTS[0]))
def test_curve_and_every_gradient_are_those_of_one_rank(
    name: str, run_ranks: Callable[..., list], one_rank: Callable[[Case], Any]
) -> None:
    case = named(name)
    found = run_ranks(case.layout.world_size, learn, case, True)
    state = assert_same(found, one_rank(case.reference))
    require_adapters_alone(state)


@pytest.mark.parametrize("name", slow_but(FUSED, FUSED[0]))
@pytest.mark.parametrize("version", slow_but(VERSIONS, NEWEST))
def test_layers_of_transformer_engine_have_the_same_adapters(
    version: str,
    name: str,
    run_fused: Callable[..., list],
    one_rank: Callable[[Case], Any],
) -> None:
    case = named(name)
    found = run_fused(version, case.layout.world_size, learn, case, False)
    assert_same(found, one_rank(case.reference))


@pytest.mark.slow
def test_a_stage_may_be_without_adapters(
    run_ranks: Callable[..., list], one_rank: Callable[..., Any]
) -> None:
    # Of the stages ME* and -ME the first alone has attention, and the embeddings.
    case = named("llm pp 2, recompute full")
    targets = {"language": frozenset({"linear_fc1"})}
    found = run_ranks(case.layout.world_size, learn, case, True, targets)
    state = assert_same(found, one_rank(case.reference, "linear_fc1"))
    assert len([key for key in state if key.startswith("lora.")]) == 2


@pytest.mark.slow
def test_dropout_is_the_same_where_layers_are_recomputed(run_ranks: Callable[..., list]) -> None:
    curves = [
        run_ranks(1, dropped, named(name), share)[0]
        for name, share in (
            ("colocated, dense", 0.5),
            ("colocated, dense, recompute full", 0.5),
            ("colocated, dense", 0.0),
        )
    ]
    assert_parity(curves[0], curves[1])
    assert curves[0][0][0] != pytest.approx(curves[2][0][0], rel=1e-3)


@pytest.mark.slow
def test_dropout_leaves_copies_on_tensor_parallel_ranks_equal(
    run_ranks: Callable[..., list],
) -> None:
    for name in ("llm tp 2, encoder tp 2", "llm tp 2, dense, no sequence parallel"):
        case = named(name)
        found = run_ranks(case.layout.world_size, learn_dropped, case, 0.5)
        assemble(parts for *_, parts in found)


def dropped(case: Case, share: float) -> list[list[float]]:
    """A rank's curve with dropout."""
    points: list[list[float]] = learn_dropped(case, share)[0]
    return points


def learn_dropped(case: Case, share: float) -> Any:
    """What a rank finds with dropout."""
    lora = {**LORA, "targets": targets_of(case), "dropout": share}
    return train(case, begin=away_from_zero, lora=lora)


def assert_same(found: list[Any], reference: Any) -> dict[str, Any]:
    """Curves, norms and all that was learnt are those of one rank; returns what was learnt."""
    wanted, wanted_held_out, wanted_state = reference
    curves = [(points, held_out) for points, held_out, *_ in found if points]
    assert curves
    for points, held_out in curves:
        assert_parity(wanted, points)
        assert held_out == pytest.approx(wanted_held_out, rel=1e-5)
        for point, expected in zip(points, wanted, strict=True):
            assert point[2:] == pytest.approx(expected[2:], rel=1e-4)
    state: dict[str, Any] = assemble(parts for *_, parts in found)
    assert_same_state(state, wanted_state)
    return state


def require_adapters_alone(state: dict[str, Any]) -> None:
    """Adapters, and the projector, which trains whole; each has learnt."""
    weights = {key for key in state if not key.startswith("optimizer.")}
    beside = {key for key in weights if not key.startswith("lora.")}
    assert beside and all(key.startswith("vision_projection.") for key in beside)
    moments = [state[f"optimizer.state.exp_avg.{key}"] for key in weights]
    assert len(weights) > 20 and all((moment != 0).any() for moment in moments)
