"""Weights must depend on seed and name alone; tensor-parallel shards are slices of the whole."""

from collections.abc import Callable

import torch


def draw(seed: int, name: str) -> dict[str, torch.Tensor]:
    """Initialise a small tensor-parallel module; its shards on this rank."""
    import torch.distributed as dist
    from torch import nn

    from megatron_mimo.model.initialize import initialize_topology_invariant
    from megatron_mimo.weights.initial import Normal

    size = dist.get_world_size()
    module = nn.Module()
    for key, shape, axis, stride in (
        ("columns", (8, 4), 0, 1),
        ("gated", (8, 4), 0, 2),
        ("rows", (4, 8), 1, 1),
        ("whole", (3, 5), None, 1),
    ):
        local = list(shape)
        if axis is not None:
            local[axis] //= size
        parameter = nn.Parameter(torch.zeros(local))
        if axis is not None:
            parameter.tensor_model_parallel = True
            parameter.partition_dim, parameter.partition_stride = axis, stride
        module.register_parameter(key, parameter)
    module.register_parameter("norm", nn.Parameter(torch.ones(6)))
    initialize_topology_invariant(
        module,
        name=name,
        seed=seed,
        initial=lambda key: None if key == "norm" else Normal(0.5),
        initial_name=lambda key: key,
        tp_group=dist.group.WORLD,
        expt_tp_group=dist.group.WORLD,
    )
    return {key: value.detach().clone() for key, value in module.named_parameters()}


def test_shards_are_slices_of_the_whole(run_ranks: Callable[..., list]) -> None:
    (whole,) = run_ranks(1, draw, 1, "llm")
    first, second = run_ranks(2, draw, 1, "llm")
    assert torch.equal(torch.cat([first["columns"], second["columns"]]), whole["columns"])
    assert torch.equal(torch.cat([first["rows"], second["rows"]], dim=1), whole["rows"])
    assert torch.equal(first["whole"], whole["whole"])
    # A rank holds its half of the gate and its half of the up projection.
    gate, up = whole["gated"].chunk(2)
    assert torch.equal(first["gated"], torch.cat([gate[:2], up[:2]]))
    assert torch.equal(second["gated"], torch.cat([gate[2:], up[2:]]))


def test_vectors_keep_their_constants(run_ranks: Callable[..., list]) -> None:
    (whole,) = run_ranks(1, draw, 1, "llm")
    assert torch.equal(whole["norm"], torch.ones(6))
    assert 0.3 < float(whole["columns"].std()) < 0.8


def test_seed_and_module_name_change_the_draw(run_ranks: Callable[..., list]) -> None:
    (whole,), (seed,), (name,) = (
        run_ranks(1, draw, *arguments) for arguments in ((1, "llm"), (2, "llm"), (1, "encoder"))
    )
    assert not torch.equal(whole["whole"], seed["whole"])
    assert not torch.equal(whole["whole"], name["whole"])


def stage_weights(tied: bool) -> dict[str, torch.Tensor]:
    """Weights of this rank's stage of a language model, layers counted over all stages."""
    import torch.distributed as dist

    from megatron_mimo.topology import Layout, ModuleGridSpec
    from megatron_mimo.topology.groups import build_topology
    from tests.integration.engines import small_model

    size = dist.get_world_size()
    llm = ModuleGridSpec(name="llm", pp=size)
    topology = build_topology(Layout.of(llm, world_size=size))
    language = small_model(topology, tied_embeddings=tied).target
    # A stage of two has one layer.
    first = language.module.model.decoder.layers[0].layer_number - 1
    return {
        name.replace("layers.0.", f"layers.{first}."): value.detach().clone()
        for name, value in language.module.named_parameters()
        if value.ndim > 1
    }


def test_stages_are_parts_of_the_whole(run_ranks: Callable[..., list]) -> None:
    (whole,) = run_ranks(1, stage_weights, False)
    first, second = run_ranks(2, stage_weights, False)
    assert set(first) | set(second) == set(whole)
    assert not set(first) & set(second)
    for name, value in (first | second).items():
        assert torch.equal(value, whole[name]), name
    layer = "model.decoder.layers.{}.mlp.linear_fc1.weight"
    assert not torch.equal(whole[layer.format(0)], whole[layer.format(1)])


def test_the_last_stage_copies_tied_embeddings(run_ranks: Callable[..., list]) -> None:
    first, second = run_ranks(2, stage_weights, True)
    embedding = first["model.embedding.word_embeddings.weight"]
    assert torch.equal(second["model.output_layer.weight"], embedding)


def drawn_by_megatron(grid: dict[str, int]) -> dict[str, torch.Tensor]:
    """This rank's weights of a language model that `--init megatron` has drawn."""
    from megatron_mimo.topology import Layout, ModuleGridSpec
    from megatron_mimo.topology.groups import build_topology
    from tests.integration.engines import small_model

    llm = ModuleGridSpec(name="llm", **grid)
    topology = build_topology(Layout.of(llm, world_size=llm.size))
    language = small_model(
        topology, provider="nemotron-moe-vlm-tiny", overrides=HYBRID, init="megatron"
    ).target
    return {name: value.detach().clone() for name, value in language.module.named_parameters()}


HYBRID = ("language.pattern=ME*-ME*-", "language.ffn_hidden_size=192", "vision.hidden_size=64")


def test_megatron_draws_each_shard_by_itself_and_replicas_alike(
    run_ranks: Callable[..., list],
) -> None:
    first, second = run_ranks(2, drawn_by_megatron, {"tp": 2})
    # On a host, megatron-core cuts most shards from a whole that every rank draws; of a convolution
    # each rank draws its own.
    shards = ("linear_fc1.weight", "linear_qkv.weight", "in_proj.weight", "conv1d_weight")
    for name, value in first.items():
        if name.endswith(shards) and "experts" not in name:
            assert not torch.equal(value, second[name]), name
        elif name.endswith(("router.weight", "norm.weight")) and "mixer.norm" not in name:
            assert torch.equal(value, second[name]), name
    for name, value in (replicas := run_ranks(2, drawn_by_megatron, {"dp": 2}))[0].items():
        assert torch.equal(value, replicas[1][name]), name


def test_megatron_draws_each_stage_by_itself(run_ranks: Callable[..., list]) -> None:
    first, second = run_ranks(2, drawn_by_megatron, {"pp": 2})
    # Both stages have the same layers, in the same order.
    same = [name for name, value in first.items() if name in second and value.ndim > 1]
    assert len(same) > 5
    for name in same:
        assert not torch.equal(first[name], second[name]), name
