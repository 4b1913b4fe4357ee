"""An optimizer step over two grids: ours against megatron-core's MimoOptimizer.

Each side has a model of its own with the same weights, built and wrapped alike, and gets the same
gradients before each step. The peer is megatron-core's `get_mimo_optimizer` as it comes; all that
it asks of a MimoModel is its modules and their grids, so these are what it is given. A step is
`step()` alone: gradients are finalised before it, by the same function of megatron-core on both
sides, and that is neither timed nor counted. Both gather the updated weights in the step.

Collectives are those that a rank takes part in, in groups of more than one rank, seen where torch
dispatches them, whoever calls; the figure is that of the rank that has most. Both sides must find
the same gradient norm and end with the same weights, or the benchmark fails.

    python benchmarks/bench_optimizer.py [--smoke | --quick] [--json FILE]
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from benchlib.ranks import own_memory, run_ranks, turns
from benchlib.report import Row, Size, run_benchmark
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES_TARGET = 0.5
SEQ_LENGTH = 64
LR = 1e-4
TINY = "nemotron-moe-vlm-tiny"
# Preset, both grids, and whether zeros in the gradients are counted.
CASES: dict[str, dict[str, Any]] = {
    "dense, dp 2 | dp 2": {"preset": "mock", "encoder": {"dp": 2}, "llm": {"dp": 2}},
    "dense, tp 2 | tp 2": {"preset": "mock", "encoder": {"tp": 2}, "llm": {"tp": 2}},
    "dense, dp 2 | pp 2": {"preset": "mock", "encoder": {"dp": 2}, "llm": {"pp": 2}},
    "experts, dp 2 | dp 2": {"preset": TINY, "encoder": {"dp": 2}, "llm": {"dp": 2}},
    "experts, dp 2 | dp 2 ep 2": {"preset": TINY, "encoder": {"dp": 2}, "llm": {"dp": 2, "ep": 2}},
    "experts, dp 2 | tp 2 ep 2": {"preset": TINY, "encoder": {"dp": 2}, "llm": {"tp": 2, "ep": 2}},
    "experts, dp 2 | dp 2 ep 2, zeros": {
        "preset": TINY,
        "encoder": {"dp": 2},
        "llm": {"dp": 2, "ep": 2},
        "zeros": True,
    },
}
# Names of cases, and repetitions of each.
SIZES: dict[Size, tuple[tuple[str, ...], int]] = {
    "smoke": (("dense, dp 2 | dp 2",), 3),
    "quick": (("dense, dp 2 | dp 2", "experts, dp 2 | dp 2 ep 2"), 20),
    "full": (tuple(CASES), 40),
}
SIDES = ("ours", "peer")


def measure(size: Size) -> Iterator[Row]:
    """The rows of every case."""
    names, repetitions = SIZES[size]
    given = {"cases": names, "repetitions": repetitions}
    for name, found in zip(names, run_ranks(work, 4, given), strict=True):
        yield from compared(name, found)


def compared(name: str, found: dict[str, Any]) -> Iterator[Row]:
    """The rows of one case."""
    yield Row(
        line=name,
        column="collectives",
        ours=(found["collectives"]["ours"],),
        peer=(found["collectives"]["peer"],),
        target=COLLECTIVES_TARGET,
        unit="collectives",
    )
    yield Row(
        line=name,
        column="time of a step",
        ours=tuple(1e3 * seconds for seconds in found["seconds"]["ours"]),
        peer=tuple(1e3 * seconds for seconds in found["seconds"]["peer"]),
        unit="ms",
    )


def work(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Every case on this rank."""
    return [stepped(CASES[name], given["repetitions"]) for name in given["cases"]]


def stepped(given: dict[str, Any], repetitions: int) -> dict[str, Any]:
    """Collectives of one step, and seconds of steps in turns."""
    from megatron_mimo.topology.groups import build_topology

    topology = build_topology(layout_of(given))
    models = {side: model_of(given["preset"], topology) for side in SIDES}
    steps = {
        "ours": our_step(models["ours"], topology, given),
        "peer": peer_step(models["peer"], topology, given),
    }
    random = torch.Generator().manual_seed(topology.rank)
    gradients = [torch.rand(grad.shape, generator=random) for grad in buffers(models["ours"])]
    norms: dict[str, float] = {}
    counts: dict[str, int] = {}
    times = torch.zeros(len(SIDES), repetitions, dtype=torch.float64)
    for repetition in range(-1, repetitions):
        for side in turns(SIDES, repetition):
            own_memory(side)
            # Clipping scales them in place.
            for buffer, gradient in zip(buffers(models[side]), gradients, strict=True):
                buffer.copy_(gradient)
            if repetition < 0:
                with counted() as found:
                    norms[side] = steps[side]()
                counts[side] = found.number
                continue
            dist.barrier()
            start = time.perf_counter()
            norms[side] = steps[side]()
            times[SIDES.index(side), repetition] = time.perf_counter() - start
    require_equal(norms, models)
    most = torch.tensor([counts[side] for side in SIDES])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return {
        "collectives": dict(zip(SIDES, most.tolist(), strict=True)),
        "seconds": dict(zip(SIDES, times.tolist(), strict=True)),
    }


def layout_of(given: dict[str, Any]) -> Any:
    """The grids, the encoder's first."""
    from megatron_mimo.topology import Layout, ModuleGridSpec

    encoder = ModuleGridSpec(name="encoder", **given["encoder"])
    llm = ModuleGridSpec(name="llm", offset=encoder.size, **given["llm"])
    return Layout.of(encoder, llm, world_size=encoder.size + llm.size)


def model_of(preset: str, topology: Any) -> Any:
    """This rank's modules, the same weights whenever it is called."""
    from megatron_mimo.config.presets import model_config
    from megatron_mimo.data import ByteTokenizer
    from megatron_mimo.model.config import Frozen
    from megatron_mimo.model.mimo import BuildConfig, build_model
    from megatron_mimo.runtime import Device

    build = BuildConfig(
        params_dtype=torch.float32,
        seed=1,
        init="topology-invariant",
        vocab_size=ByteTokenizer.vocab_size,
        seq_length=SEQ_LENGTH,
        sequence_parallel=True,
    )
    return build_model(model_config(preset), Frozen(), build, topology, Device("cpu"))


def buffers(model: Any) -> list[Tensor]:
    """Gradient buffers of a rank's modules, each flat [n] in the dtype of the gradients."""
    return [
        buffer.grad_data
        for replica in model.replicas
        for buffer in replica.ddp.buffers + replica.ddp.expert_parallel_buffers
    ]


def our_step(model: Any, topology: Any, given: dict[str, Any]) -> Callable[[], float]:
    """A step of ours; its gradient norm."""
    from megatron_mimo.optim.config import AdamConfig
    from megatron_mimo.optim.mimo_optimizer import MimoOptimizer

    config = AdamConfig(
        lr=LR,
        min_lr=0.0,
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        clip_grad=1.0,
        log_num_zeros=given.get("zeros", False),
    )
    optimizer = MimoOptimizer(model, config, tuple(topology.layout.modules), topology.control)
    return lambda: optimizer.step().grad_norm


def peer_step(model: Any, topology: Any, given: dict[str, Any]) -> Callable[[], float]:
    """A step of the peer's over the same modules; its gradient norm."""
    from benchlib.peer_step import VISION
    from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
    from megatron.core.models.mimo.optimizer import get_mimo_optimizer
    from megatron.core.optimizer import OptimizerConfig

    layout = topology.layout
    grids = {
        VISION: grid_of(layout.modules["encoder"]),
        MIMO_LANGUAGE_MODULE_KEY: grid_of(layout.target),
    }
    encoder = model.modules.get("encoder")
    modules: Any = SimpleNamespace(
        mimo_config=SimpleNamespace(module_to_grid_map=grids),
        language_model=None if model.target is None else model.target.ddp,
        modality_submodules={VISION: encoder and encoder.ddp},
    )
    optimizer = get_mimo_optimizer(
        modules,
        OptimizerConfig(
            optimizer="adam",
            lr=LR,
            min_lr=0.0,
            weight_decay=0.01,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_eps=1e-8,
            clip_grad=1.0,
            log_num_zeros_in_grad=given.get("zeros", False),
            use_distributed_optimizer=True,
        ),
    )

    def step() -> float:
        success, norm, _ = optimizer.step()
        if not success or norm is None:
            raise RuntimeError(f"megatron-core's step found gradients that are not finite: {norm}")
        return float(norm)

    return step


def grid_of(spec: Any) -> Any:
    """A module's grid with the groups that the peer's optimizer looks for."""
    from megatron.core.hyper_comm_grid import HyperCommGrid

    from megatron_mimo.topology.spec import AXES, EXPERT_AXES

    grid = HyperCommGrid(list(spec.shape), list(AXES), rank_offset=spec.offset)
    grid.register_view("expert", list(spec.expert_shape), list(EXPERT_AXES), shared_dims=["pp"])
    for axes in (["tp"], ["dp"], ["pp"], ["dp", "cp"], ["tp", "pp"], ["tp", "cp", "dp", "pp"]):
        grid.create_pg(axes)
    grid.create_pg(["expt_tp", "ep", "pp"], view="expert")
    grid.create_pg(["expt_dp"], view="expert")
    return grid


@dataclass
class Count:
    """Collectives in groups of more than one rank that this rank has taken part in."""

    number: int = 0


@contextmanager
def counted() -> Iterator[Count]:
    """Count the collectives of this rank inside the block."""
    count = Count()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "c10d":
                count.number += group_size(func, args) > 1
            return func(*args, **(kwargs or {}))

    with Counting():  # type: ignore[no-untyped-call]
        yield count


def group_size(function: Any, args: Sequence[Any]) -> int:
    """Ranks in the group of a collective, whose place in the arguments differs."""
    for parameter, value in zip(function._schema.arguments, args, strict=False):
        if parameter.name == "process_group":
            return int(dist.ProcessGroup.unbox(value).size())
    raise RuntimeError(f"{function} has no process group")


def require_equal(norms: dict[str, float], models: dict[str, Any]) -> None:
    """Refuse results of the two sides that differ.

    Raises:
        RuntimeError: Gradient norms or weights differ.
    """
    if not math.isclose(norms["ours"], norms["peer"], rel_tol=1e-5):
        raise RuntimeError(f"the gradient norms differ: {norms}")
    for mine, theirs in zip(models["ours"].replicas, models["peer"].replicas, strict=True):
        parameters = dict(theirs.module.named_parameters())
        for name, weight in mine.module.named_parameters():
            if not torch.allclose(weight, parameters[name], rtol=1e-4, atol=1e-6):
                apart = float((weight - parameters[name]).abs().max())
                raise RuntimeError(f"{name} differs by {apart} between ours and the peer's")


if __name__ == "__main__":
    run_benchmark(__doc__, measure, threads=1)
