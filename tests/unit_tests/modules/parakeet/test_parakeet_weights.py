"""Import and export of Parakeet folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.modules.parakeet.peer import BASE, built, write_parakeet

LAYER = "layers.1.conv"


def round_trip(folder: Path, fields: dict[str, Any]) -> list[str]:
    """Tensors that a load and a save change, as transformers reads both."""
    import torch
    from transformers import ParakeetEncoder

    from megatron_mimo.modules.parakeet.weights import export_weights, write_config
    from megatron_mimo.weights.folder import write_folder

    write_parakeet(folder / "in", **fields)
    encoder = built(folder / "in")
    config = encoder.parakeet_config
    exported = export_weights(encoder, config)
    write_folder(folder / "out", write_config(config), exported)
    before = ParakeetEncoder.from_pretrained(folder / "in")
    after, info = ParakeetEncoder.from_pretrained(folder / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert set(exported) == set(before.state_dict())
    for field, value in before.config.to_dict().items():
        if field not in ("_name_or_path", "dtype", "transformers_version"):
            assert getattr(after.config, field) == value, field
    assert exported[f"{LAYER}.norm.num_batches_tracked"].dtype == torch.int64
    theirs = after.state_dict()
    return [name for name, tensor in before.state_dict().items() if not tensor.equal(theirs[name])]


@pytest.mark.parametrize(
    "fields",
    [{}, {"attention_bias": True, "scale_input": True, "convolution_bias": False}],
    ids=["as Nemotron Omni", "other biases"],
)
def test_round_trip_is_exact(
    run_ranks: Callable[..., list], tmp_path: Path, fields: dict[str, Any]
) -> None:
    assert run_ranks(1, round_trip, tmp_path, fields) == [[]]


def restored(folder: Path) -> list[str]:
    """Tensors that a folder in bfloat16 does not get back after a load in the other dtype."""
    import torch
    from safetensors.torch import load_file, save_file

    from megatron_mimo.modules.parakeet.weights import restore_weights
    from megatron_mimo.weights.folder import WeightFolder

    write_parakeet().bfloat16().save_pretrained(folder)
    file = folder / "model.safetensors"
    # Released folders hold the filters of their feature extractor.
    stored = load_file(file) | {"feature_extractor.featurizer.window": torch.rand(4)}
    save_file(stored, file)
    encoder = built(folder)
    with torch.no_grad():
        encoder.layers["1"].convolution.batch_norm.running_mean.add_(1)
    with WeightFolder(folder) as weights:
        found = dict(restore_weights(encoder, encoder.parakeet_config, weights))
    assert set(found) == set(stored)
    return [name for name, tensor in stored.items() if not found[name].equal(tensor)]


def test_unchanged_weights_come_back_as_stored(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    assert run_ranks(1, restored, tmp_path) == [[f"{LAYER}.norm.running_mean"]]


def load_error(folder: Path) -> str:
    """The message of a load that must fail."""
    with pytest.raises(ValueError) as caught:
        built(folder)
    return str(caught.value)


def test_missing_unexpected_and_misshapen_weights_are_listed(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    write_parakeet(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    mean = tensors.pop(f"{LAYER}.norm.running_mean")
    save_file(tensors | {"layers.7.surprise": mean}, file)
    (message,) = run_ranks(1, load_error, tmp_path)
    assert message == (
        f"the weights in {tmp_path} do not fit the architecture that its config.json describes: "
        f"1 missing: {LAYER}.norm.running_mean; 1 unexpected: layers.7.surprise"
    )
    kernel = tensors[f"{LAYER}.depthwise_conv.weight"]
    tensors |= {
        f"{LAYER}.norm.running_mean": mean,
        f"{LAYER}.depthwise_conv.weight": kernel.repeat(1, 2, 1),
    }
    save_file(tensors, file)
    (message,) = run_ranks(1, load_error, tmp_path)
    assert f"{LAYER}.depthwise_conv.weight has shape [32, 2, 9]" in message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "clip", "a model of type 'clip': expected 'parakeet_encoder'"),
        ("subsampling_conv_kernel_size", 5, "subsampling_conv_kernel_size is 5, only 3 is"),
        ("subsampling_conv_stride", 3, "subsampling_conv_stride is 3, only 2 is supported"),
        ("hidden_act", "tanh", "hidden_act is 'tanh': expected one of silu"),
        ("num_mel_bins", 20, "num_mel_bins is 20"),
        ("conv_kernel_size", 8, "conv_kernel_size is 8: expected an odd number"),
        ("subsampling_factor", 6, "subsampling_factor is 6: expected a power of two"),
        ("num_attention_heads", 5, "hidden_size is 32"),
    ],
)
def test_other_architectures_are_refused(field: str, value: object, message: str) -> None:
    from megatron_mimo.modules.parakeet.weights import read_config

    with pytest.raises(ValueError) as caught:
        read_config(BASE | {field: value}, "config.json")
    assert str(caught.value).startswith("config.json")
    assert message in str(caught.value)


def test_fields_that_a_folder_leaves_out_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig, ParakeetEncoderConfig
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3_Config

    from megatron_mimo.modules.parakeet.weights import (
        OMNI_DEFAULTS,
        read_config,
        write_config,
    )

    theirs = ParakeetEncoderConfig().to_dict()
    alone = write_config(read_config({}, "config.json"))
    no_dropout = ("dropout", "layerdrop", "activation_dropout", "attention_dropout")
    for name, value in alone.items():
        if name not in ("architectures", "model_type", *no_dropout):
            assert theirs[name] == value, name
    section = {"hidden_size": 512}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "nemotron_h_omni", "sound_config": section})
    )
    omni = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(omni, NemotronH_Omni_Reasoning_V3_Config)
    within = write_config(read_config(section, "config.json", defaults=OMNI_DEFAULTS))
    for name, value in within.items():
        if name not in ("architectures", "model_type", *no_dropout):
            assert omni.audio_config.to_dict()[name] == value, name
