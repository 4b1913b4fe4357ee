"""Training steps on a host: gradient buffers, the distributed optimizer, recomputation."""

import pytest

from tests.harness import RunRanks
from tests.unit_tests.kernels.small_gpt import build_gpt, llm_layout, losses_of, named


def optimizer_steps(overlap: bool, dtype_name: str) -> tuple[list[float], bool]:
    """Losses of four steps of the distributed optimizer; whether replicas end equal."""
    import torch
    import torch.distributed as dist
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    from megatron_mimo.topology.groups import build_topology

    bf16 = dtype_name == "bfloat16"
    module = build_topology(llm_layout(dp=2)).target
    assert module is not None
    dtype = {"params_dtype": getattr(torch, dtype_name), "bf16": bf16}
    model = build_gpt(module, dtype)
    wrapped = Float16Module(model.config, model) if bf16 else model
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=True
        ),
        wrapped,
        pg_collection=module.pg_collection,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=1e-2,
            bf16=bf16,
            params_dtype=dtype["params_dtype"],
            use_distributed_optimizer=True,
            clip_grad=1.0,
        ),
        [ddp],
        use_gloo_process_groups=False,
        pg_collection=module.pg_collection,
    )
    trace = []
    for _ in range(4):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss = losses_of(ddp, module).float().mean()
        loss.backward()
        finalize_model_grads([ddp], pg_collection=module.pg_collection)
        successful, _, _ = optimizer.step()
        assert successful
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        trace.append(float(mean) / 2)
    flat = torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    return trace, torch.equal(*both)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("overlap", [False, True])
def test_distributed_optimizer_trains(run_ranks: RunRanks, overlap: bool, dtype: str) -> None:
    for trace, equal in run_ranks(2, optimizer_steps, overlap, dtype):
        assert trace[-1] < trace[0] - 0.2
        assert equal


def recomputed_gradients() -> dict[str, float]:
    """Largest differences in gradients that recomputation makes, with dropout."""
    from megatron_mimo.topology.groups import build_topology

    module = build_topology(llm_layout()).target
    assert module is not None
    runs = []
    for recompute in (
        {},
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    ):
        dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
        model = build_gpt(module, recompute | dropout | {"add_bias_linear": False})
        losses_of(model, module).sum().backward()
        runs.append({name: parameter.grad for name, parameter in named(model)})
    return {
        f"{kind} {name}": float((runs[0][name] - gradient).abs().max())
        for kind, run in (("full", runs[1]), ("selective", runs[2]))
        for name, gradient in run.items()
    }


def test_recomputation_changes_nothing(run_ranks: RunRanks) -> None:
    (differences,) = run_ranks(1, recomputed_gradients)
    assert differences
    assert {name for name, difference in differences.items() if difference} == set()


def recompute_mlp_with_bias() -> str:
    """What building a model with it says."""
    from megatron_mimo.topology.groups import build_topology

    module = build_topology(llm_layout()).target
    assert module is not None
    try:
        build_gpt(module, {"recompute_granularity": "selective", "recompute_modules": ["mlp"]})
    except ValueError as error:
        return str(error)
    return "no error"


def test_endless_recomputation_is_refused(run_ranks: RunRanks) -> None:
    assert "--recompute-modules mlp with biases" in run_ranks(1, recompute_mlp_with_bias)[0]
