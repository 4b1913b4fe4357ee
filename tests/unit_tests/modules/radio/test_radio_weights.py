"""Import and export of RADIO folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.modules.radio.peer import difference, random_images, write_radio

BLOCK = "radio_model.model.blocks.1"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a folder's tensors."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def load_error(folder: Path) -> str:
    """The message of a load that must fail."""
    from megatron_mimo.modules.radio import RadioEncoder

    with pytest.raises(ValueError) as caught:
        RadioEncoder.from_pretrained(folder, device="cpu")
    return str(caught.value)


def test_missing_and_unexpected_weights_are_listed(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    write_radio(tmp_path)

    def change(tensors: dict[str, Any]) -> None:
        del tensors[f"{BLOCK}.attn.qkv.bias"]
        tensors["radio_model.model.surprise"] = tensors.pop(f"{BLOCK}.norm1.weight")

    edit(tmp_path, change)
    (message,) = run_ranks(1, load_error, tmp_path)
    assert message == (
        f"the weights in {tmp_path} do not fit the architecture that its config.json describes: "
        f"2 missing: {BLOCK}.attn.qkv.bias, {BLOCK}.norm1.weight; "
        f"1 unexpected: radio_model.model.surprise"
    )


def test_a_weight_of_another_shape_is_named(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    write_radio(tmp_path)
    name = f"{BLOCK}.mlp.fc1.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    (message,) = run_ranks(1, load_error, tmp_path)
    assert f"{name} has shape [127, 64]" in message
    assert "the shape [128, 64]" in message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "clip", "a model of type 'clip': expected 'radio'"),
        ("use_swiglu_ffn", True, "use_swiglu_ffn is True, only False is supported"),
        ("qkv_bias", False, "qkv_bias is False, only True is supported"),
        ("hidden_act", "silu", "hidden_act is 'silu': expected one of gelu"),
    ],
)
def test_other_architectures_are_refused(
    run_ranks: Callable[..., list], tmp_path: Path, field: str, value: object, message: str
) -> None:
    write_radio(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    (found,) = run_ranks(1, load_error, tmp_path)
    assert found.startswith(str(file))
    assert message in found


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json is missing: expected a folder as transformers"),
        ("config.json", b"{", "config.json cannot be read"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", b"\0" * 40, "model.safetensors is damaged"),
    ],
)
def test_damaged_folders(
    run_ranks: Callable[..., list],
    tmp_path: Path,
    file: str,
    content: bytes | None,
    message: str,
) -> None:
    write_radio(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    (found,) = run_ranks(1, load_error, tmp_path)
    assert found.startswith(str(tmp_path / file))
    assert message in found


def cut_short(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return load_error(folder)


def test_a_truncated_file_is_damaged(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    write_radio(tmp_path)
    (found,) = run_ranks(1, cut_short, tmp_path)
    assert "model.safetensors is damaged" in found


def round_trip(folder: Path) -> list[str]:
    """Tensors that a load and a save change, as transformers reads both."""
    from transformers import RadioModel

    from megatron_mimo.modules.radio import RadioEncoder

    write_radio(folder / "in", norm_mean=[0.25, 0.5, 0.75], summary_idxs=[2, 0])
    RadioEncoder.from_pretrained(folder / "in", device="cpu").save_pretrained(folder / "out")
    before, info_before = RadioModel.from_pretrained(folder / "in", output_loading_info=True)
    after, info = RadioModel.from_pretrained(folder / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info_before["missing_keys"]
    for field, value in before.config.to_dict().items():
        if field not in ("_name_or_path", "initializer_range", "dtype", "transformers_version"):
            assert getattr(after.config, field) == value, field
    theirs = after.state_dict()
    return [name for name, tensor in before.state_dict().items() if not tensor.equal(theirs[name])]


def test_round_trip_is_exact(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    assert run_ranks(1, round_trip, tmp_path) == [[]]


def other_folders(folder: Path) -> dict[str, float]:
    """Differences of features over folders that hold the same weights in other ways."""
    import torch
    from safetensors.torch import save_file

    from megatron_mimo.modules.radio import RadioEncoder

    model = write_radio(folder / "published")
    images = random_images([(2, 3), (4, 4)])

    def features(name: str) -> Any:
        with torch.no_grad():
            encoder = RadioEncoder.from_pretrained(folder / name, device="cpu")
            return torch.cat(encoder.features(images))

    wanted = features("published")
    model.save_pretrained(folder / "in several files", max_shard_size="50KB")
    assert (folder / "in several files" / "model.safetensors.index.json").exists()
    by_module = folder / "by module"
    by_module.mkdir()
    (by_module / "config.json").write_text((folder / "published" / "config.json").read_text())
    save_file(model.state_dict(), by_module / "model.safetensors")
    found = {name: difference(features(name), wanted) for name in ("in several files", "by module")}
    # A scale per channel behind attention and MLP, which the weights here take up.
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.layer_scale1.lambda1.uniform_(0.5, 1.5)
            layer.layer_scale2.lambda1.uniform_(0.5, 1.5)
        theirs = torch.cat([model(image[None]).features[0] for image in images])
    model.save_pretrained(folder / "scaled")
    found["scaled"] = difference(features("scaled"), theirs)
    assert difference(theirs, wanted) > 1e-2
    return found


def test_the_same_weights_stored_otherwise(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    (found,) = run_ranks(1, other_folders, tmp_path)
    assert found["in several files"] == found["by module"] == 0
    assert found["scaled"] < 1e-5


def final_norm(folder: Path) -> float:
    """Difference to transformers' features behind a norm of our own."""
    import torch

    from megatron_mimo.modules.radio import RadioEncoder

    model = write_radio(folder)
    norm = torch.nn.LayerNorm(64, eps=1e-6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-1, 1)
    stored = {
        f"radio_model.model.norm.{kind}": getattr(norm, kind).detach()
        for kind in ("weight", "bias")
    }
    edit(folder, lambda tensors: tensors.update(stored))
    encoder = RadioEncoder.from_pretrained(folder, device="cpu")
    assert encoder.config.final_layernorm
    (image,) = random_images([(2, 3)])
    with torch.no_grad():
        wanted = norm(model(image[None]).features[0])
        found = difference(encoder.features([image])[0], wanted)
    encoder.save_pretrained(folder / "again")
    again = RadioEncoder.from_pretrained(folder / "again", device="cpu")
    with torch.no_grad():
        assert again.features([image])[0].equal(encoder.features([image])[0])
    return found


def test_the_final_norm_is_there_when_the_weights_have_it(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    assert run_ranks(1, final_norm, tmp_path)[0] < 1e-5


def sharded_features(folder: Path, tp: int, pp: int) -> Any:
    """Features of the last stage, from weights that each rank read its shard of; None before."""
    import torch
    import torch.distributed as dist

    from megatron_mimo.media.images.packing import pack_patches
    from megatron_mimo.modules.radio.vit import RadioVit
    from megatron_mimo.modules.radio.weights import load_weights, read_config
    from megatron_mimo.topology import Layout, ModuleGridSpec
    from megatron_mimo.topology.groups import build_topology
    from megatron_mimo.weights.folder import WeightFolder

    encoder = ModuleGridSpec(name="encoder", tp=tp, pp=pp)
    llm = ModuleGridSpec(name="llm", dp=tp * pp)
    layout = Layout.of(encoder, llm, world_size=tp * pp)
    groups = build_topology(layout).modules["encoder"]
    with WeightFolder(folder) as weights:
        config = read_config(weights)
        vit = RadioVit(config, groups.pg_collection, torch.float32)
        load_weights(vit, config, weights, tp_rank=groups.place.tp, tp_size=tp)
    random = torch.Generator().manual_seed(4)
    grids = [(3, 5), (2, 2)]
    patches = torch.randn(19, 3 * config.patch_dim**2, generator=random)
    packed = pack_patches(patches, grids, config.image_config(min_patches=1))
    hidden = None
    with torch.no_grad():
        if groups.place.pp:
            hidden = torch.empty(packed.num_tokens, config.hidden_size)
            dist.recv(hidden, encoder.rank(tp=groups.place.tp, pp=groups.place.pp - 1))
        tokens = vit(packed, hidden)
        if groups.place.pp < pp - 1:
            dist.send(tokens, encoder.rank(tp=groups.place.tp, pp=groups.place.pp + 1))
            return None
    return tokens[packed.patch_slots].detach()


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 3), (2, 2)])
def test_each_rank_loads_its_shard(
    run_ranks: Callable[..., list], tmp_path: Path, tp: int, pp: int
) -> None:
    write_radio(tmp_path, num_hidden_layers=pp * 2)
    (wanted,) = run_ranks(1, sharded_features, tmp_path, 1, 1)
    found = [
        out for out in run_ranks(tp * pp, sharded_features, tmp_path, tp, pp) if out is not None
    ]
    assert len(found) == tp
    for features in found:
        assert difference(features, wanted) < 1e-5
