"""RADIO over context-parallel ranks against one rank: rows, and the gradient of every weight."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit_tests.modules.radio.peer import difference

ROW_WIDTH = 24
FRAMES = 2
# Grids of images, and of videos with their number of groups.
ITEMS: dict[str, list[tuple[tuple[int, int], int]]] = {
    "one large image": [((12, 18), 0)],
    "many small images": [((2, 2), 0), ((4, 2), 0), ((2, 4), 0)] * 4,
    "a large image among small ones": [((2, 2), 0), ((14, 10), 0), ((4, 4), 0), ((2, 6), 0)],
    "videos and images": [((4, 6), 3), ((2, 2), 0), ((8, 10), 1), ((6, 4), 0), ((2, 2), 2)],
    "fewer rows than ranks": [((2, 2), 0)],
}
LAYOUTS = {
    "cp 2": (2, 1, 1),
    "cp 4": (4, 1, 1),
    "cp 2, tp 2": (2, 2, 1),
    "cp 2, pp 2": (2, 1, 2),
}
# Everything over two and four ranks; other axes with the items that are hardest to share.
CASES = [(items, layout) for items in ITEMS for layout in ("cp 2", "cp 4")] + [
    (items, layout)
    for items in ("videos and images", "fewer rows than ranks")
    for layout in ("cp 2, tp 2", "cp 2, pp 2")
]


def groups_of(cp: int, tp: int, pp: int) -> Any:
    """Groups of a grid of so many ranks."""
    from megatron_mimo.topology import Layout, ModuleGridSpec
    from megatron_mimo.topology.groups import build_topology

    vision = ModuleGridSpec(name="vision", cp=cp, tp=tp, pp=pp)
    llm = ModuleGridSpec(name="llm", dp=vision.size)
    return build_topology(Layout.of(vision, llm, world_size=vision.size)).modules["vision"]


def module_of(groups: Any, frozen: frozenset[str], scale: bool) -> Any:
    """A stage of encoder and projector, whose weights are drawn by name."""
    import torch

    from megatron_mimo.model.initialize import initialize_topology_invariant
    from megatron_mimo.modules.projector.config import ProjectorConfig
    from megatron_mimo.modules.radio.config import (
        RadioConfig,
        RadioModuleConfig,
        VideoEmbeddingConfig,
    )
    from megatron_mimo.modules.radio.module import RadioModule

    module = RadioModule(
        RadioModuleConfig(
            vision=RadioConfig(
                num_layers=2,
                hidden_size=32,
                num_attention_heads=4,
                ffn_hidden_size=48,
                patch_dim=4,
                patch_bias=True,
                class_token_len=3,
                num_registers=1,
                position_grid=8,
                layer_scale=scale,
                final_layernorm=True,
                init_method_std=0.3,
                position_init_std=0.3,
            ),
            projector=ProjectorConfig(ffn_hidden_size=16, init_method_std=0.3, bias=True),
            video=VideoEmbeddingConfig(frames=FRAMES, init_method_std=0.3),
        ),
        groups.pg_collection,
        # So that differences are not those of sums in another order.
        torch.float64,
        row_width=ROW_WIDTH,
        frozen=frozen,
    )
    initialize_topology_invariant(
        module,
        name="vision",
        seed=1,
        initial=module.initial,
        initial_name=module.initial_name,
        tp_group=groups.pg_collection.tp,
        expt_tp_group=groups.pg_collection.expt_tp,
    )
    return module


def packed_of(items: list[tuple[tuple[int, int], int]], module: Any) -> Any:
    """Items of random pixels, with random crops of the position table."""
    import numpy as np

    from megatron_mimo.media.images.encode import EncodedImage
    from megatron_mimo.media.images.packing import pack_images
    from megatron_mimo.media.video.clip import EncodedVideo

    random = np.random.default_rng(7)
    settings = module.architecture.vision.image_config(position_crop=True)
    pixels = 3 * settings.patch_dim**2
    encoded: list[Any] = []
    for grid, groups in items:
        patches, rows = grid[0] * grid[1], grid[0] * grid[1] // 4
        if groups:
            values = random.uniform(0, 255, (groups * patches, FRAMES * pixels)).astype(np.float32)
            encoded.append(
                EncodedVideo(grid=grid, labels=("",) * groups, rows=groups * rows, patches=values)
            )
        else:
            values = random.integers(0, 256, (patches, pixels), dtype=np.uint8)
            encoded.append(EncodedImage((grid,), rows, values))
    packed = pack_images(encoded, settings, seeds=range(len(encoded)))
    assert packed is not None
    return packed


def run_stage(module: Any, groups: Any, packed: Any) -> Any:
    """Forward and backward of a stage, with its neighbours; rows on the last, else None."""
    import torch
    import torch.distributed as dist

    from megatron_mimo.modules.families import source_adapter

    spec, place = groups.spec, groups.place
    config = module.architecture
    if spec.cp > 1:
        packed = source_adapter(config).part(config, packed, rank=place.cp, ranks=spec.cp)
    hidden = None
    if place.pp:
        hidden = torch.empty(packed.num_tokens, config.vision.hidden_size, dtype=torch.float64)
        dist.recv(hidden, spec.rank(tp=place.tp, cp=place.cp, pp=place.pp - 1))
        hidden.requires_grad_()
    output = module(packed, hidden)
    if place.pp < spec.pp - 1:
        after = spec.rank(tp=place.tp, cp=place.cp, pp=place.pp + 1)
        dist.send(output.detach(), after)
        gradient = torch.empty_like(output)
        dist.recv(gradient, after)
    else:
        random = torch.Generator().manual_seed(5)
        gradient = torch.randn(output.shape, generator=random, dtype=torch.float64)
    if output.requires_grad:
        output.backward(gradient)
    if hidden is not None:
        dist.send(hidden.grad, spec.rank(tp=place.tp, cp=place.cp, pp=place.pp - 1))
    return output.detach() if place.pp == spec.pp - 1 else None


def trained(
    items: list[tuple[tuple[int, int], int]],
    sizes: tuple[int, int, int],
    frozen: frozenset[str],
    scale: bool,
) -> tuple[Any, dict[str, Any], dict[str, int | None]]:
    """Rows, the gradients of this rank's shards summed over cp ranks, and the axis of shards."""
    import torch.distributed as dist

    from megatron_mimo.weights.names import table_name
    from megatron_mimo.weights.shards import sharded_axis

    groups = groups_of(*sizes)
    module = module_of(groups, frozen, scale)
    rows = run_stage(module, groups, packed_of(items, module))
    gradients = {}
    weights = {table_name(module, name): weight for name, weight in module.named_parameters()}
    for name, parameter in weights.items():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            # As data parallelism does it.
            dist.all_reduce(parameter.grad, group=groups.pg_collection.dp_cp)
            gradients[name] = parameter.grad
    return rows, gradients, {name: sharded_axis(weight) for name, weight in weights.items()}


def assert_is_that_of_one_rank(
    run_ranks: Callable[..., list],
    items: str,
    layout: str,
    frozen: frozenset[str] = frozenset(),
    *,
    scale: bool = False,
) -> None:
    import torch

    cp, tp, pp = LAYOUTS[layout]
    ((wanted, whole, _),) = run_ranks(1, trained, ITEMS[items], (1, 1, 1), frozen, scale)
    found = run_ranks(cp * tp * pp, trained, ITEMS[items], (cp, tp, pp), frozen, scale)
    rows = [each for each, _, _ in found if each is not None]
    assert len(rows) == cp * tp
    assert max(difference(each, wanted) for each in rows) < 1e-9
    parts: dict[str, list[Any]] = {}
    axes: dict[str, int | None] = {}
    for _, gradients, of_rank in found:
        for name, gradient in gradients.items():
            parts.setdefault(name, []).append(gradient)
        axes |= of_rank
    assert set(parts) == set(whole)
    for name, gradients in parts.items():
        assert len(gradients) == cp * tp, name
        axis = axes[name]
        # Ranks of a tensor-parallel group follow each other.
        for first in range(0, len(gradients), tp):
            shards = gradients[first : first + tp]
            joined = shards[0] if axis is None or tp == 1 else torch.cat(shards, dim=axis)
            if whole[name].any():
                assert difference(joined, whole[name]) < 1e-9, name
            else:
                # The embedding of videos where there are none.
                assert name.startswith("video.") and not joined.any(), name


@pytest.mark.parametrize(("items", "layout"), CASES)
def test_rows_and_gradients_are_those_of_one_rank(
    run_ranks: Callable[..., list], items: str, layout: str
) -> None:
    assert_is_that_of_one_rank(run_ranks, items, layout)


@pytest.mark.parametrize("frozen", [("vision",), ("vision", "video"), ("projector",)], ids="+".join)
def test_frozen_parts(run_ranks: Callable[..., list], frozen: tuple[str, ...]) -> None:
    assert_is_that_of_one_rank(
        run_ranks, "videos and images", "cp 2", frozenset(frozen), scale=True
    )


def kept(sizes: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes that are kept for backward of one large image, beside weights; and tokens."""
    import torch

    from megatron_mimo.modules.families import source_adapter

    groups = groups_of(*sizes)
    module = module_of(groups, frozenset(), scale=False)
    packed = packed_of([((40, 48), 0)], module)
    if groups.spec.cp > 1:
        config, place = module.architecture, groups.place
        packed = source_adapter(config).part(config, packed, rank=place.cp, ranks=groups.spec.cp)
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(packed, None)
    assert output.requires_grad
    return sum(storages.values()), packed.num_tokens


@pytest.mark.parametrize("cp", [2, 4])
def test_memory_for_backward_is_shared(run_ranks: Callable[..., list], cp: int) -> None:
    ((whole, tokens),) = run_ranks(1, kept, (1, 1, 1))
    found = run_ranks(cp, kept, (cp, 1, 1))
    assert sum(mine for _, mine in found) == tokens
    for mine, _ in found:
        # Keys and values of the others are gathered again in backward, and not kept.
        assert mine == pytest.approx(whole / cp, rel=0.15)
