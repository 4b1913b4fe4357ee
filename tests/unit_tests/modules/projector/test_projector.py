"""The projector against the same written with torch alone."""

from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit_tests.modules.radio.peer import difference

if TYPE_CHECKING:
    from torch import Tensor

INPUT, INNER, OUTPUT = 12, 16, 8
KINDS = [*product(["mlp"], ["RMSNorm", "LayerNorm", "none"], ["squared_relu", "gelu"])]
KINDS += [*product(["affine"], ["RMSNorm", "LayerNorm", "none"], ["gelu"])]


def project(
    kind: str, normalization: str, activation: str, bias: bool, tp: int
) -> "tuple[Tensor, Tensor, Tensor, Tensor]":
    """Rows and their gradient, by the projector and by torch."""
    import torch
    import torch.nn.functional as F

    from megatron_mimo.modules.projector.config import ProjectorConfig
    from megatron_mimo.modules.projector.projector import Projector
    from megatron_mimo.topology import Layout, ModuleGridSpec
    from megatron_mimo.topology.groups import build_topology
    from megatron_mimo.weights.shards import full_shape, take_shard

    encoder, llm = ModuleGridSpec(name="encoder", tp=tp), ModuleGridSpec(name="llm", dp=tp)
    groups = build_topology(Layout.of(encoder, llm, world_size=tp)).modules["encoder"]
    config = ProjectorConfig(
        kind=kind,  # type: ignore[arg-type]
        normalization=normalization,  # type: ignore[arg-type]
        activation=activation,  # type: ignore[arg-type]
        ffn_hidden_size=INNER,
        bias=bias,
    )
    projector = Projector(config, INPUT, OUTPUT, groups.pg_collection, torch.float32)
    random, weights = torch.Generator().manual_seed(1), {}
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            weights[name] = torch.randn(full_shape(parameter, tp), generator=random)
            shard = take_shard(weights[name], parameter, tp_rank=groups.place.tp, tp_size=tp)
            parameter.copy_(shard)
    ours = torch.randn(5, INPUT, generator=random, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    x = theirs
    if normalization == "RMSNorm":
        x = F.rms_norm(x, (INPUT,), weights["norm.weight"], 1e-5)
    elif normalization == "LayerNorm":
        x = F.layer_norm(x, (INPUT,), weights["norm.weight"], weights["norm.bias"], 1e-5)
    if kind == "affine":
        x = F.linear(x, weights["linear.weight"], weights.get("linear.bias"))
    else:
        x = F.linear(x, weights["mlp.linear_fc1.weight"], weights.get("mlp.linear_fc1.bias"))
        x = F.gelu(x) if activation == "gelu" else F.relu(x).square()
        x = F.linear(x, weights["mlp.linear_fc2.weight"], weights.get("mlp.linear_fc2.bias"))
    found = projector(ours)
    pull = torch.randn(found.shape, generator=random)
    found.backward(pull)
    x.backward(pull)
    assert ours.grad is not None and theirs.grad is not None
    return found.detach(), x.detach(), ours.grad, theirs.grad


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_projector(
    run_ranks: Callable[..., list[Any]], kind: tuple[str, str, str], bias: bool, tp: int
) -> None:
    for found, wanted, gradient, wanted_gradient in run_ranks(tp, project, *kind, bias, tp):
        assert difference(found, wanted) < 1e-5
        assert difference(gradient, wanted_gradient) < 1e-5


def test_unknown_kinds_are_refused() -> None:
    from megatron_mimo.modules.projector.config import ProjectorConfig

    with pytest.raises(ValueError, match="kind is 'conv': expected one of mlp, affine"):
        ProjectorConfig(kind="conv")  # type: ignore[arg-type]
