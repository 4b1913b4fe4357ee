"""Our scan and gated norm against mamba-ssm's own Triton kernels, run by Triton's interpreter.

Arguments are those of megatron-core's `MambaMixer`. The kernels compute in float32, and ours in
float64, so that what is left of a difference is their rounding. In float16 both round.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import pytest

from tests.harness.slices import slow_but
from tests.interpreted.packages import NEWEST, VERSIONS

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCES = {"float32": 2e-6, "float16": 5e-3}
"""Of the largest element. Float32 rounds to 6e-8 and float16 to 5e-4, here in some ten places one
after the other; a gradient sums some hundred products."""


class Scan(NamedTuple):
    """Sizes of a scan. Several documents stand in one row, one after another."""

    documents: tuple[int, ...] = ()
    length: int = 19
    batch: int = 1
    heads: int = 4
    groups: int = 2
    per_channel: bool = False
    dtype: str = "float32"


def apart(found: "dict[str, Tensor]", wanted: "dict[str, Tensor]") -> dict[str, float]:
    """Largest difference of each tensor, as a share of its largest element."""
    assert found.keys() == wanted.keys()
    return {
        # Behind a single token the rate of decay has no gradient at all.
        name: float((found[name] - whole).abs().max() / whole.abs().max().clamp_min(1e-9))
        for name, whole in wanted.items()
    }


def learned(
    function: "Callable[..., Tensor]", leaves: "dict[str, Tensor]", **options: Any
) -> "dict[str, Tensor]":
    """Output and gradients of a function of `leaves`, of a sum of outputs with weights."""
    import torch

    inputs = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    output = function(**inputs, **options)
    pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output.float() * pull).sum().backward()
    gradients = {name: leaf.grad.float() for name, leaf in inputs.items() if leaf.grad is not None}
    assert gradients.keys() == leaves.keys()
    return {"output": output.detach().float(), **gradients}


def scans(cases: list[Scan]) -> list[dict[str, float]]:
    """How far the kernels' output and gradients are from ours, for each case."""
    return [scan(case) for case in cases]


def scan(case: Scan) -> dict[str, float]:
    import torch
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    from megatron_mimo.kernels import ssd

    random, dtype = torch.Generator().manual_seed(3), getattr(torch, case.dtype)
    length = sum(case.documents) or case.length
    width, state = 4, 8
    inner = case.heads * width
    channels = inner + 2 * case.groups * state

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    leaves = {
        "zxbcdt": draw(case.batch, length, inner + channels + case.heads).to(dtype),
        "conv1d_weight": (0.5 * draw(channels, 4)).to(dtype),
        "conv1d_bias": (0.5 * draw(channels)).to(dtype),
        "dt_bias": draw(case.heads),
        "A": -torch.exp(draw(case.heads)),
        "D": draw(case.heads, width) if case.per_channel else draw(case.heads),
    }
    numbers = [n for n, size in enumerate(case.documents) for _ in range(size)]
    options: dict[str, Any] = {
        # Less than a document, so that states cross chunks and end inside of them.
        "chunk_size": 8,
        "activation": "silu",
        "headdim": None if case.per_channel else width,
        "ngroups": case.groups,
        "norm_before_gate": False,
        "seq_idx": torch.tensor([numbers], dtype=torch.int32) if numbers else None,
    }
    exact = leaves if dtype.itemsize < 4 else {name: leaf.double() for name, leaf in leaves.items()}
    # Chunks end elsewhere than the kernels'.
    with mock.patch.object(ssd, "_CHUNK", 4):
        ours = learned(ssd.split_conv_scan, exact, **options)
    return apart(learned(mamba_split_conv1d_scan_combined, leaves, **options), ours)


SCANS = [
    Scan(batch=2, length=11, heads=2, groups=1),
    # Borders inside a chunk, at its end, and a document of a single token.
    Scan(documents=(5, 3, 1, 10)),
]
MORE_SCANS = [
    *SCANS,
    Scan(length=1),
    Scan(length=8),
    Scan(length=33),
    Scan(per_channel=True),
    Scan(documents=(16, 1, 1, 15), heads=6, groups=3),
    Scan(documents=(2,) * 9, per_channel=True),
    Scan(documents=(37,), heads=2, groups=2),
    *(case._replace(dtype="float16") for case in SCANS),
]


@pytest.mark.parametrize("version", slow_but(VERSIONS, NEWEST))
@pytest.mark.parametrize(
    "cases", [SCANS, pytest.param(MORE_SCANS, marks=pytest.mark.slow)], ids=["some", "more"]
)
def test_scan_of_a_mixer(
    version: str,
    cases: list[Scan],
    run_interpreted: Callable[..., list],
    subtests: pytest.Subtests,
) -> None:
    (found,) = run_interpreted(version, 1, scans, cases, timeout=300)
    for case, differences in zip(cases, found, strict=True):
        with subtests.test(**case._asdict()):
            assert max(differences.values()) < TOLERANCES[case.dtype], differences


def norms(cases: list[tuple[int | None, bool]]) -> list[dict[str, float]]:
    """As `scans`, of the norm after a scan: over groups of a size, with a gate or without."""
    import torch
    from mamba_ssm.ops.triton.layernorm_gated import RMSNorm

    from megatron_mimo.kernels.ssd import GroupedRMSNorm

    found = []
    for group_size, gated in cases:
        random = torch.Generator().manual_seed(4)
        leaves = {"x": torch.randn(5, 2, 24, generator=random)}
        if gated:
            leaves["gate"] = torch.randn(5, 2, 24, generator=random)
        # Small enough for the number added to the mean square to count.
        leaves["x"][0] *= 0.03
        leaves["weight"] = torch.randn(24, generator=random)
        sizes: dict[str, Any] = {"eps": 1e-5, "group_size": group_size, "norm_before_gate": False}
        ours, theirs = (kind(24, **sizes) for kind in (GroupedRMSNorm, RMSNorm))
        exact = {name: leaf.double() for name, leaf in leaves.items()}
        found.append(
            apart(learned(partial(normed, theirs), leaves), learned(partial(normed, ours), exact))
        )
    return found


def normed(norm: Any, x: "Tensor", weight: "Tensor", gate: "Tensor | None" = None) -> "Tensor":
    """The output of a norm whose weight is `weight`."""
    from torch.func import functional_call

    inputs = (x,) if gate is None else (x, gate)
    output: Tensor = functional_call(norm, {"weight": weight}, inputs)
    return output


NORMS = [(None, False), (8, False), (8, True)]


@pytest.mark.parametrize("version", slow_but(VERSIONS, NEWEST))
def test_norm_of_a_mixer(
    version: str, run_interpreted: Callable[..., list], subtests: pytest.Subtests
) -> None:
    (found,) = run_interpreted(version, 1, norms, NORMS, timeout=300)
    for (group_size, gated), differences in zip(NORMS, found, strict=True):
        with subtests.test(group_size=group_size, gated=gated):
            assert max(differences.values()) < TOLERANCES["float32"], differences
