"""A small model on any grids, whose stages are run one after the other, without the executor."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_mimo.model.config import Frozen, ModelConfig
    from megatron_mimo.model.mimo import MimoModel, ModuleReplica
    from megatron_mimo.topology.groups import Topology

VOCAB, IMAGE, WIDTH, LAYERS = 64, 63, 32, 4
LENGTH = 24


def small_config(*, tied: bool = False) -> "ModelConfig":
    """Each module has four layers of four heads, the llm two key-value heads."""
    from megatron_mimo.config.presets import model_config

    sizes = {"num_layers": LAYERS, "hidden_size": WIDTH, "ffn_hidden_size": 48}
    overrides = [f"{part}.{key}={n}" for part in ("vision", "language") for key, n in sizes.items()]
    overrides.append(f"language.share_embeddings_and_output_weights={str(tied).lower()}")
    return model_config("mock", [*overrides, "vision.patch_dim=2", "projector.ffn_hidden_size=48"])


def small_model(
    topology: "Topology",
    *,
    frozen: "Frozen" = frozenset(),
    sequence_parallel: bool = True,
    tied: bool = False,
    init: str = "topology-invariant",
) -> "MimoModel":
    """This rank's modules."""
    import torch

    from megatron_mimo.model.mimo import BuildConfig, build_model
    from megatron_mimo.runtime import Device

    return build_model(
        small_config(tied=tied),
        frozen,
        BuildConfig(
            params_dtype=torch.float32,
            seed=3,
            init=init,
            vocab_size=VOCAB,
            seq_length=LENGTH,
            sequence_parallel=sequence_parallel,
        ),
        topology,
        Device("cpu"),
    )


def run_stage(
    replica: "ModuleReplica",
    compute: "Callable[[Tensor | None], Tensor]",
    hidden_rows: int,
    inputs: "Tensor | None",
) -> "Tensor":
    """Forward and backward of this rank's stage between those of its neighbours.

    Args:
        replica: The module.
        compute: The stage; the last returns a scalar.
        hidden_rows: N of the hidden states [N, WIDTH] between stages.
        inputs: Of the first stage; later ones receive theirs.

    Returns:
        What `compute` returned. A gradient goes back to the stage before where that trains.
    """
    import torch
    import torch.distributed as dist

    groups, place = replica.groups, replica.groups.place

    def neighbour(offset: int) -> int:
        return groups.spec.rank(tp=place.tp, cp=place.cp, dp=place.dp, pp=place.pp + offset)

    trains = torch.zeros(1)
    if not groups.is_first_stage:
        inputs = torch.empty(hidden_rows, WIDTH)
        dist.recv(inputs, neighbour(-1))
        dist.recv(trains, neighbour(-1))
        inputs.requires_grad_(bool(trains))
    output, gradient = compute(inputs), None
    if not groups.is_last_stage:
        assert output.shape == (hidden_rows, WIDTH)
        dist.send(output.detach(), neighbour(1))
        dist.send(torch.tensor([float(output.requires_grad)]), neighbour(1))
        if output.requires_grad:
            gradient = torch.empty_like(output)
            dist.recv(gradient, neighbour(1))
    if output.requires_grad:
        output.backward(gradient)
    if trains:
        assert inputs is not None
        dist.send(inputs.grad, neighbour(-1))
    return output


def whole_gradients(replica: "ModuleReplica") -> "dict[str, Tensor]":
    """Gradients after `finalize_gradients`, put together from the ranks that share them.

    Layers are counted over all stages. What does not train is left out.
    """
    import torch
    import torch.distributed as dist

    groups = replica.groups.pg_collection
    if replica.ddp is None:
        return {}
    for buffer in replica.ddp.buffers:
        for bucket in buffer.buckets:
            # A rank holds the sum of its own shard only, as its optimizer needs no other.
            shards = list(bucket.grad_data.chunk(groups.dp_cp.size()))
            dist.all_gather(shards, shards[groups.dp_cp.rank()].clone(), group=groups.dp_cp)
    gradients = {}
    for name, parameter in replica.module.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient: Any = parameter.main_grad
        if getattr(parameter, "tensor_model_parallel", False):
            parts = [torch.empty_like(gradient) for _ in range(groups.tp.size())]
            dist.all_gather(parts, gradient.contiguous(), group=groups.tp)
            gradient = torch.cat(parts, dim=parameter.partition_dim)
        gradients[global_name(replica, name)] = gradient.clone()
    return gradients


def global_name(replica: "ModuleReplica", name: str) -> str:
    """A parameter's name with its layer counted over all stages, which hold the same number."""
    groups = replica.groups
    before = groups.place.pp * (LAYERS // groups.spec.pp)
    return re.sub(r"layers\.(\d+)", lambda found: f"layers.{before + int(found[1])}", name)


def assert_close(found: "Tensor", wanted: "Tensor", name: str) -> None:
    """Equal up to the order of sums."""
    import torch

    torch.testing.assert_close(
        found,
        wanted,
        rtol=1e-4,
        atol=1e-5 * float(wanted.abs().max()),
        msg=lambda text: f"{name}: {text}",
    )
