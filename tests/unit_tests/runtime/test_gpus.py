"""GPUs that a run can use, and NCCL that torch can use."""

import pytest
import torch

from megatron_mimo.runtime import nccl
from megatron_mimo.runtime.gpus import Gpu, unsuitable

KERNELS = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


def gpu(name: str, major: int, minor: int) -> Gpu:
    return Gpu(index=3, name=name, memory=80 << 30, capability=(major, minor))


@pytest.mark.parametrize(
    ("name", "capability"),
    [("A100", (8, 0)), ("L40S", (8, 9)), ("H100", (9, 0)), ("B200", (10, 0)), ("B300", (10, 3))],
)
def test_newer_gpus_are_used(name: str, capability: tuple[int, int]) -> None:
    assert unsuitable(gpu(name, *capability), KERNELS) is None
    assert unsuitable(gpu(name, *capability), ()) is None


@pytest.mark.parametrize(("name", "capability"), [("V100", (7, 0)), ("T4", (7, 5))])
def test_a_gpu_without_bfloat16_is_refused(name: str, capability: tuple[int, int]) -> None:
    found = unsuitable(gpu(name, *capability), KERNELS)
    assert found is not None and "\n" not in found
    assert found.startswith(f"GPU 3, {name}, of compute capability {capability[0]}.{capability[1]}")
    assert "expected 8.0 or newer" in found and "bfloat16" in found


@pytest.mark.parametrize(
    ("capability", "kernels", "runs"),
    [
        ((9, 0), ("sm_80",), False),
        ((9, 0), ("compute_80",), True),
        ((9, 0), ("compute_100",), False),
        ((8, 9), ("sm_80",), True),
        ((8, 0), ("sm_86",), False),
        ((10, 3), ("sm_100a",), False),
        ((10, 0), ("sm_100a",), True),
    ],
)
def test_torch_needs_kernels_for_it(
    capability: tuple[int, int], kernels: tuple[str, ...], runs: bool
) -> None:
    found = unsuitable(gpu("X", *capability), kernels)
    assert (found is None) == runs
    assert runs or f"has kernels for, {kernels[0]}" in str(found)


@pytest.mark.parametrize(
    ("built", "found", "wrong"),
    [
        ((2, 29, 7), (2, 29, 7), False),
        ((2, 29, 7), (2, 30, 4), False),
        ((2, 29, 7), (2, 29, 3), True),
        ((2, 29, 7), (2, 18, 5), True),
        (None, (2, 18, 5), False),
        ((2, 29, 7), None, False),
    ],
)
def test_an_older_nccl_than_torch_was_built_for_is_refused(
    built: nccl.Version | None, found: nccl.Version | None, wrong: bool
) -> None:
    said = nccl.too_old(built, found)
    assert (said is not None) == wrong
    if said is not None:
        assert found is not None
        assert said.startswith(f"NCCL {found[0]}.{found[1]}.{found[2]}: expected 2.29.7 or newer")


def test_the_loaded_nccl_is_found() -> None:
    if torch.version.cuda is None:
        # A build for hosts has none.
        assert (nccl.built_for(), nccl.describe()) == (None, None)
        return
    built = nccl.built_for()
    assert built is not None
    # An environment that torch's own requirements were installed into.
    assert nccl.loaded() in (None, built)
    assert nccl.describe() == ".".join(map(str, built))


@pytest.mark.parametrize(
    ("number", "version"), [(22907, (2, 29, 7)), (23004, (2, 30, 4)), (2804, (2, 8, 4))]
)
def test_numbers_of_nccl(number: int, version: nccl.Version) -> None:
    assert nccl._parts(number) == version
