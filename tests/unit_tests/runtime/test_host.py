"""megatron-core's CUDA calls on a host, and everything else unchanged."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import RunRanks

ROOT = Path(__file__).resolve().parents[3]


def run_alone(code: str) -> str:
    """Output of `code` in a fresh process, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def cuda_device_is_read_as_host() -> dict[str, str]:
    """Device type that each way to name a GPU ends on."""
    import torch

    x = torch.ones(2)
    found = {
        "keyword": torch.zeros(2, device="cuda"),
        "index": torch.zeros(2, device="cuda:1"),
        "object": torch.ones(2, device=torch.device("cuda", 0)),
        "current": torch.empty(2, device=torch.cuda.current_device()),
        "tensor": torch.tensor([1.0], device="cuda"),
        "like": torch.empty_like(x, device="cuda"),
        "arange": torch.arange(3, device="cuda"),
        "random": torch.randn(3, device="cuda"),
        "new": x.new_zeros(2, device="cuda"),
        "to": x.to("cuda"),
        "to index": x.to(0),
        "to keyword": x.to(device="cuda", dtype=torch.float64),
        "to current": x.to(torch.cuda.current_device()),
        "cuda": x.cuda(),
        "cuda index": x.cuda(0, non_blocking=True),
        "module cuda": torch.nn.Linear(2, 2).cuda().weight,
        "module to": torch.nn.Linear(2, 2).to("cuda").weight,
    }
    return {name: tensor.device.type for name, tensor in found.items()}


def test_cuda_device_is_read_as_host(run_ranks: RunRanks) -> None:
    (found,) = run_ranks(1, cuda_device_is_read_as_host)
    assert set(found.values()) == {"cpu"}, found


def reached_during_backward() -> tuple[str, str]:
    """Device types of tensors made for "cuda" inside backward, and in another thread."""
    import threading

    import torch

    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append(torch.zeros(1, device="cuda").device.type)
            return grad

    Probe.apply(torch.ones(1, requires_grad=True)).sum().backward()
    thread = threading.Thread(target=lambda: seen.append(torch.zeros(1, device="cuda").device.type))
    thread.start()
    thread.join()
    return seen[0], seen[1]


def test_backward_and_threads_are_covered(run_ranks: RunRanks) -> None:
    assert run_ranks(1, reached_during_backward) == [("cpu", "cpu")]


def plain_code_is_unchanged() -> None:
    """Assert what code that knows nothing of a GPU relies on."""
    import copy

    import torch

    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0
    x = torch.arange(4.0).view(2, 2)
    assert x.to("cpu") is x
    assert x.to(x) is x
    assert x.to(torch.float64).dtype == torch.float64
    assert x.to("meta").device.type == "meta"
    assert x.to(device="cpu", dtype=torch.int32, copy=True).tolist() == [[0, 1], [2, 3]]
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2, device=None).device.type == "cpu"
    assert torch.tensor([1, 2]).dtype == torch.int64
    assert torch.zeros((2, 3), dtype=torch.int8).shape == (2, 3)
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
    assert copy.deepcopy(torch.nn.Linear(2, 2)).weight.is_leaf
    assert x.type(torch.int32).dtype == torch.int32
    assert x.type("torch.LongTensor").dtype == torch.int64
    assert torch.zeros(1, device="meta").type() != "torch.cuda.FloatTensor"

    @torch.jit.script
    def scripted(x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(2, dtype=x.dtype, device=x.device)

    assert torch.equal(scripted(x), x + 1)
    with torch.random.fork_rng():
        torch.rand(3)


def test_plain_code_is_unchanged(run_ranks: RunRanks) -> None:
    run_ranks(1, plain_code_is_unchanged)


def pieces_of_different_lengths() -> None:
    """Gather and scatter, forward and backward, against what every rank can compute alone."""
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel.mappings import (
        gather_from_sequence_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    group, rank, sizes = dist.group.WORLD, dist.get_rank(), [3, 0, 1]
    pieces = [torch.full((size, 2), float(i + 1)) for i, size in enumerate(sizes)]
    weights = [torch.arange(8.0).view(4, 2) * (i + 1) for i in range(len(sizes))]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    piece = pieces[rank].requires_grad_()
    whole = gather_from_sequence_parallel_region(piece, group=group, output_split_sizes=sizes)
    assert torch.equal(whole, torch.cat([piece.detach() for piece in pieces]))
    (whole * weights[rank]).sum().backward()
    # Each rank's piece takes part in every rank's sum.
    assert torch.equal(piece.grad, sum(weights)[mine])
    whole = weights[rank].clone().requires_grad_()
    part = reduce_scatter_to_sequence_parallel_region(whole, group=group, input_split_sizes=sizes)
    assert torch.equal(part, sum(weights)[mine])
    (part * pieces[rank].detach()).sum().backward()
    assert torch.equal(whole.grad, torch.cat([piece.detach() for piece in pieces]))


def test_pieces_of_different_lengths_are_gathered_and_scattered(run_ranks: RunRanks) -> None:
    run_ranks(3, pieces_of_different_lengths)


def type_names() -> list[str]:
    """What `Tensor.type()` calls parameters of the three dtypes that megatron-core knows."""
    import torch

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return [torch.nn.Parameter(torch.zeros(1, dtype=dtype)).type() for dtype in dtypes]


def test_parameter_types_have_the_names_that_optimizers_expect(run_ranks: RunRanks) -> None:
    assert run_ranks(1, type_names) == [
        ["torch.cuda.FloatTensor", "torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"]
    ]


def streams_have_nothing_pending() -> None:
    """Walk through the calls that gradient buffers and dispatchers make."""
    import torch

    side = torch.cuda.Stream(device="cuda", priority=torch.cuda.Stream.priority_range()[1])
    side.wait_stream(torch.cuda.current_stream())
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(side), torch.cuda.device(0):
        end.record(side)
    torch.cuda.current_stream().wait_event(end)
    side.record_event().synchronize()
    torch.ones(1).record_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_device(0)
    torch.cuda.empty_cache()
    assert side.query() and end.query()
    assert start.elapsed_time(end) >= 0
    assert not torch.cuda.is_current_stream_capturing()


def test_streams_have_nothing_pending(run_ranks: RunRanks) -> None:
    run_ranks(1, streams_have_nothing_pending)


def one_random_stream() -> None:
    """The GPU's generator is the host's, through every name that reaches it."""
    import torch

    torch.cuda.manual_seed(3)
    first = torch.rand(2)
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    assert torch.equal(first, torch.rand(2))
    torch.cuda.set_rng_state(state, device=-1)
    assert torch.equal(first, torch.rand(2))
    torch.cuda.random.manual_seed_all(3)
    assert torch.equal(torch.cuda.random.get_rng_state(device="cuda"), state)
    index = torch.cuda.current_device()
    assert torch.cuda.default_generators[index].get_state().equal(state)


def test_one_random_stream(run_ranks: RunRanks) -> None:
    run_ranks(1, one_random_stream)


def second_installation() -> bool:
    """Whether installing again replaces anything."""
    import torch

    from megatron_mimo.runtime import install_host_adaptation
    from megatron_mimo.runtime.host import host_adaptation_installed

    assert host_adaptation_installed()
    before = (torch.zeros, torch.Tensor.to, torch.cuda.Stream)
    install_host_adaptation()
    return before != (torch.zeros, torch.Tensor.to, torch.cuda.Stream)


def test_installed_once(run_ranks: RunRanks) -> None:
    assert run_ranks(1, second_installation) == [False]


def test_inert_on_a_gpu_and_late_installation_is_refused() -> None:
    output = run_alone(
        """
import sys, types, torch
from megatron_mimo.runtime import Device, install_host_adaptation
from megatron_mimo.runtime.host import host_adaptation_installed
before = (torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.cuda.Stream, torch.compile)
install_host_adaptation(Device("cuda", 0))
after = (torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.cuda.Stream, torch.compile)
print(before == after, host_adaptation_installed(), "megatron.core" in sys.modules)
sys.modules["megatron.core"] = types.ModuleType("megatron.core")
try:
    install_host_adaptation(Device("cpu"))
except RuntimeError as error:
    print(error)
print(before == (torch.zeros, torch.Tensor.to, torch.Tensor.type, torch.cuda.Stream, torch.compile))
"""
    )
    lines = output.splitlines()
    assert lines[0] == "True False False"
    assert "megatron.core was imported before" in lines[1]
    assert "initialize()" in lines[1]
    assert lines[2] == "True"


def test_a_single_process_without_triton_starts_in_silence() -> None:
    output = run_alone(
        """
import sys, warnings
sys.modules["triton"] = None
warnings.filterwarnings("ignore", category=DeprecationWarning)
from megatron_mimo.runtime import initialize, shutdown
context = initialize("auto", timeout_minutes=1)
import torch
from megatron.core.transformer.moe.paged_stash import paged_stash_copy_kernel
try:
    paged_stash_copy_kernel()
except RuntimeError as error:
    assert "triton" in str(error)
else:
    raise AssertionError("a kernel ran without triton")
assert "torch._dynamo" not in sys.modules, "megatron-core's import loaded the compiler"
import torch._dynamo
assert torch.distributed.get_backend() == "gloo"
print(context.rank, context.local_rank, context.world_size, context.device.type)
try:
    initialize()
except RuntimeError as error:
    print(error)
shutdown()
shutdown()
print(torch.distributed.is_initialized())
"""
    )
    lines = output.splitlines()
    assert lines == [
        "0 0 1 cpu",
        "a default process group exists already: call shutdown() before initialize()",
        "False",
    ]


def test_timeout_must_be_positive() -> None:
    from megatron_mimo.runtime import initialize

    with pytest.raises(ValueError, match="--distributed-timeout-minutes 0"):
        initialize("cpu", timeout_minutes=0)
