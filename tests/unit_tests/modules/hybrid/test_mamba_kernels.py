"""A Mamba layer over mamba-ssm's Triton kernels, as megatron-core builds it on a GPU.

Loss and every gradient are those of the layer over our scan. The kernels run in Triton's
interpreter; `tests/unit_tests/kernels/test_mamba_ssm.py` has them one by one.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.interpreted.packages import VERSIONS
from tests.unit_tests.modules.test_fused_adapters import compare, learn


def learn_over_kernels(packed: bool) -> tuple[str, Any]:
    """What the layers are, and what they learn."""
    from megatron_mimo.kernels.hybrid import describe_hybrid

    return describe_hybrid(), learn("mamba", packed, "float32")


# Every day the kernels are tried one by one, which costs a third of it.
@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_loss_and_gradients_are_those_of_our_scan(
    version: str,
    packed: bool,
    run_ranks: Callable[..., list],
    run_interpreted: Callable[..., list],
) -> None:
    (wanted,) = run_ranks(1, learn, "mamba", packed, "float32")
    ((described, found),) = run_interpreted(version, 1, learn_over_kernels, packed, timeout=300)
    assert described.startswith("Mamba layers: mamba-ssm")
    compare(found, wanted)
