"""Parakeet on several ranks against one: rows, gradients of every shard, names in checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.modules.parakeet.peer import (
    SAMPLES,
    clips_of,
    difference,
    write_parakeet,
)

ROW_WIDTH = 24
FIELDS = {"num_hidden_layers": 4, "attention_bias": True}
LAYOUTS = [(2, 1), (4, 1), (1, 2), (2, 2)]
IDS = [f"tp {tp}, pp {pp}" for tp, pp in LAYOUTS]


def groups_of(tp: int, pp: int, dp: int = 1) -> Any:
    """Groups of a grid of so many ranks."""
    from megatron_mimo.topology import Layout, ModuleGridSpec
    from megatron_mimo.topology.groups import build_topology

    audio = ModuleGridSpec(name="audio", tp=tp, pp=pp, dp=dp)
    llm = ModuleGridSpec(name="llm", dp=tp * pp * dp)
    layout = Layout.of(audio, llm, world_size=tp * pp * dp)
    return build_topology(layout).modules["audio"]


def module_of(folder: Path, groups: Any) -> Any:
    """A stage of encoder and projector, with a folder's weights and drawn ones."""
    import torch

    from megatron_mimo.model.initialize import initialize_topology_invariant
    from megatron_mimo.modules.parakeet.config import ParakeetModuleConfig
    from megatron_mimo.modules.parakeet.module import ParakeetModule
    from megatron_mimo.modules.parakeet.weights import load_weights, read_config
    from megatron_mimo.modules.projector.config import ProjectorConfig
    from megatron_mimo.weights.folder import WeightFolder

    with WeightFolder(folder) as weights:
        config = read_config(weights.config, weights.config_name)
        module = ParakeetModule(
            ParakeetModuleConfig(
                audio=config,
                audio_projector=ProjectorConfig(ffn_hidden_size=16, init_method_std=0.3),
            ),
            groups.pg_collection,
            # So that differences are not those of sums in another order.
            torch.float64,
            row_width=ROW_WIDTH,
        )
        initialize_topology_invariant(
            module,
            name="audio",
            seed=1,
            initial=module.initial,
            initial_name=module.initial_name,
            tp_group=groups.pg_collection.tp,
            expt_tp_group=groups.pg_collection.expt_tp,
        )
        place = {"tp_rank": groups.place.tp, "tp_size": groups.spec.tp}
        load_weights(module.audio, config, weights, **place)
    return module


def run_stage(module: Any, groups: Any, packed: Any) -> Any:
    """Forward and backward of a stage, with its neighbours; rows on the last, else None."""
    import torch
    import torch.distributed as dist

    spec, place = groups.spec, groups.place
    width = module.architecture.audio.hidden_size
    hidden = None
    if place.pp:
        hidden = torch.empty(packed.num_tokens, width, dtype=torch.float64)
        dist.recv(hidden, spec.rank(tp=place.tp, pp=place.pp - 1))
        hidden.requires_grad_()
    output = module(packed, hidden)
    if place.pp < spec.pp - 1:
        after = spec.rank(tp=place.tp, pp=place.pp + 1)
        dist.send(output.detach(), after)
        gradient = torch.empty_like(output)
        dist.recv(gradient, after)
    else:
        random = torch.Generator().manual_seed(5)
        gradient = torch.randn(output.shape, generator=random, dtype=torch.float64)
    output.backward(gradient)
    if hidden is not None:
        dist.send(hidden.grad, spec.rank(tp=place.tp, pp=place.pp - 1))
    return output.detach() if place.pp == spec.pp - 1 else None


def trained(folder: Path, tp: int, pp: int) -> tuple[Any, dict[str, Any], dict[str, bool]]:
    """Rows, the gradients of this rank's shards by name, and whether tensors are shared out."""
    from megatron_mimo.media.audio.packing import pack_clips
    from megatron_mimo.weights.shards import sharded_axis

    groups = groups_of(tp, pp)
    module = module_of(folder, groups)
    config = module.architecture.audio.audio_config()
    packed = pack_clips(clips_of(SAMPLES, config), config)
    rows = run_stage(module, groups, packed)
    parameters = dict(module.named_parameters())
    return (
        rows,
        {name: parameter.grad for name, parameter in parameters.items()},
        {name: sharded_axis(parameter) is not None for name, parameter in parameters.items()},
    )


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS, ids=IDS)
def test_rows_and_gradients_are_those_of_one_rank(
    run_ranks: Callable[..., list], tmp_path: Path, tp: int, pp: int
) -> None:
    write_parakeet(tmp_path, **FIELDS)
    ((wanted, whole, _),) = run_ranks(1, trained, tmp_path, 1, 1)
    found = run_ranks(tp * pp, trained, tmp_path, tp, pp)
    rows = [each for each, _, _ in found if each is not None]
    assert len(rows) == tp
    assert max(difference(each, wanted) for each in rows) < 1e-9
    parts: dict[str, list[Any]] = {}
    shared: dict[str, bool] = {}
    for _, gradients, marks in found:
        for name, gradient in gradients.items():
            parts.setdefault(name, []).append(gradient)
        shared |= marks
    assert set(parts) == set(whole)
    for name, gradients in parts.items():
        assert len(gradients) == tp, name
        if shared[name] and tp > 1:
            gradient = joined(name, gradients, whole[name])
        else:
            # Every rank has the whole gradient, not a share of it.
            assert all(difference(each, whole[name]) < 1e-9 for each in gradients), name
            gradient = gradients[0]
        assert difference(gradient, whole[name]) < 1e-9, name


def joined(name: str, shards: list[Any], whole: Any) -> Any:
    """The whole gradient, put together independently of the marks of the weights."""
    import torch

    axis = next(
        i for i, (a, b) in enumerate(zip(shards[0].shape, whole.shape, strict=True)) if a < b
    )
    if ".pointwise_in." in name:
        # Values of all ranks, then gates.
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return torch.cat([half[part] for part in range(2) for half in halves])
    return torch.cat(shards, dim=axis)


def stored(folder: Path, tp: int, pp: int) -> dict[str, tuple[Any, list[Any]]]:
    """Key of every stored tensor -> its shape, and the boxes that this rank would write."""
    from types import SimpleNamespace

    from megatron_mimo.checkpoint.tensors import writes
    from megatron_mimo.modules.families import adapter_of

    groups = groups_of(tp, pp)
    module = module_of(folder, groups)
    replica: Any = SimpleNamespace(
        module=module,
        groups=groups,
        prefixes=adapter_of(module.architecture).prefixes(module.architecture, "audio"),
        left_out=(),
    )
    found: dict[str, tuple[Any, list[Any]]] = {}
    for tensor in writes(replica, {}):
        _, boxes = found.setdefault(tensor.key, (tensor.global_shape, []))
        boxes.append((tensor.global_offset, tensor.data.detach().clone()))
    return found


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS, ids=IDS)
def test_checkpoints_have_the_tensors_of_one_rank(
    run_ranks: Callable[..., list], tmp_path: Path, tp: int, pp: int
) -> None:
    import torch

    write_parakeet(tmp_path, **FIELDS)
    (wanted,) = run_ranks(1, stored, tmp_path, 1, 1)
    assert "sound_model.layers.3.convolution.batch_norm.running_var" in wanted
    assert "sound_projection.mlp.linear_fc2.weight" in wanted
    found: dict[str, Any] = {}
    for rank in run_ranks(tp * pp, stored, tmp_path, tp, pp):
        for key, (shape, boxes) in rank.items():
            whole, count = found.setdefault(key, (torch.zeros(shape), torch.zeros(shape)))
            for offset, data in boxes:
                at = tuple(slice(a, a + n) for a, n in zip(offset, data.shape, strict=True))
                whole[at] = data.to(whole)
                count[at] += 1
    assert set(found) == set(wanted)
    for key, (shape, boxes) in wanted.items():
        whole, count = found[key]
        assert (count == 1).all(), key
        reference = torch.zeros(shape)
        for offset, data in boxes:
            at = tuple(slice(a, a + n) for a, n in zip(offset, data.shape, strict=True))
            reference[at] = data.to(reference)
        assert whole.equal(reference), key


def test_sizes_that_do_not_divide_are_refused() -> None:
    from megatron_mimo.modules.families import source_adapter
    from megatron_mimo.modules.parakeet.config import ParakeetModuleConfig

    config = ParakeetModuleConfig()
    divisions = {
        (each.axis, each.part, each.field) for each in source_adapter(config).divisions(config)
    }
    assert divisions == {
        ("pp", "audio", "num_layers"),
        ("tp", "audio", "num_attention_heads"),
        ("tp", "audio", "ffn_hidden_size"),
        ("tp", "audio_projector", "ffn_hidden_size"),
    }


def drawn(tp: int) -> dict[str, tuple[float, float]]:
    """Deviation of each weight as it is built, and that of `--init topology-invariant`."""
    import torch

    from megatron_mimo.modules.parakeet.config import ParakeetConfig, ParakeetModuleConfig
    from megatron_mimo.modules.parakeet.module import ParakeetModule
    from megatron_mimo.modules.projector.config import ProjectorConfig

    torch.manual_seed(7)
    config = ParakeetModuleConfig(
        audio=ParakeetConfig(
            num_layers=1,
            hidden_size=64,
            ffn_hidden_size=64,
            subsampling_conv_channels=64,
            init_method_std=0.05,
            convolution_init_std=0.2,
        ),
        audio_projector=ProjectorConfig(ffn_hidden_size=64, init_method_std=0.01),
    )
    groups = groups_of(tp, 1).pg_collection
    module = ParakeetModule(config, groups, torch.float32, row_width=64)
    found = {}
    for name, weight in module.named_parameters():
        draw: Any = module.initial(name)
        found[name] = float(weight.detach().std()), 0.0 if draw is None else draw.std
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_initial_weights_of_the_constructor(run_ranks: Callable[..., list], tp: int) -> None:
    for found in run_ranks(tp, drawn, tp):
        assert {wanted for _, wanted in found.values()} == {0.0, 0.01, 0.05, 0.2}
        for name, (std, wanted) in found.items():
            if "audio_projector.mlp.linear_fc2" not in name:
                # Of as few as 32 numbers.
                assert std == pytest.approx(wanted, rel=0.4), name
