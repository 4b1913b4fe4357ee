"""Random Parakeet encoders of transformers, and clips to encode."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mimo.media.audio.clip import EncodedClip
from megatron_mimo.media.audio.config import AudioConfig

if TYPE_CHECKING:
    from torch import Tensor

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "subsampling_conv_channels": 8,
    "num_mel_bins": 16,
    "attention_bias": False,
    "scale_input": False,
    "dropout": 0.0,
    "layerdrop": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    # Far from the usual 0.02, so that every weight matters.
    "initializer_range": 0.2,
}
# Samples: no valid frame, the extra row (multiples of 8 hops), one row, and so on.
SAMPLES = (100, 160 * 8, 160 * 9, 160 * 41 + 3, 160 * 16, 160 * 8, 160 * 64, 160 * 1, 160 * 47)


def write_parakeet(folder: Path | str | None = None, **fields: Any) -> Any:
    """A random `ParakeetEncoder` whose norms and statistics are random too, in evaluation mode."""
    import torch
    from transformers import ParakeetEncoder, ParakeetEncoderConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(1)
    model = ParakeetEncoder(ParakeetEncoderConfig(**BASE | fields)).eval()
    with torch.no_grad():
        # transformers starts biases and means at zero, norms and variances at one.
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif name.endswith(("bias", "running_mean")) or ".norm" in name:
                if tensor.is_floating_point():
                    tensor.add_(0.1 * torch.randn_like(tensor))
    if folder is not None:
        model.save_pretrained(folder)
    return model


def clips_of(samples: Sequence[int], config: AudioConfig, seed: int = 2) -> list[EncodedClip]:
    """Clips of random mel features, of these numbers of samples."""
    import numpy as np

    random = np.random.default_rng(seed)
    clips = []
    for each in samples:
        frames = config.num_frames(each)
        features = random.standard_normal((frames, config.num_mel_bins)).astype(np.float32)
        features[-1] = 0
        clips.append(EncodedClip(samples=each, rows=config.num_rows(frames), features=features))
    return clips


def alone(model: Any, clip: EncodedClip) -> "Tensor":
    """Rows [rows, H] that transformers gives a clip that is alone."""
    import torch

    assert clip.features is not None
    features = torch.from_numpy(clip.features)[None].to(model.dtype)
    mask = torch.ones(features.shape[:2], dtype=torch.long)
    mask[:, -1] = 0
    rows: Tensor = model(features, attention_mask=mask).last_hidden_state[0]
    assert len(rows) == clip.rows
    return rows


def difference(found: "Tensor", wanted: "Tensor") -> float:
    """Largest absolute difference, relative to the largest value."""
    assert found.shape == wanted.shape
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max())


def built(folder: Path | str, dtype: Any = None, **changes: Any) -> Any:
    """A whole `ParakeetEncoder` of ours with a folder's weights, and changes of its config."""
    from dataclasses import replace

    import torch

    from megatron_mimo.modules.parakeet.encoder import ParakeetEncoder
    from megatron_mimo.modules.parakeet.weights import load_weights, read_config
    from megatron_mimo.runtime.solo import solo_groups
    from megatron_mimo.weights.folder import WeightFolder

    with WeightFolder(folder) as weights:
        config = replace(read_config(weights.config, weights.config_name), **changes)
        encoder = ParakeetEncoder(config, solo_groups(), dtype or torch.float32, initialize=False)
        load_weights(encoder, config, weights, tp_rank=0, tp_size=1)
    return encoder.eval()


def packed_rows(encoder: Any, clips: Sequence[EncodedClip]) -> "Tensor":
    """Rows [R, H] of clips in one pack, in the order of clips."""
    from megatron_mimo.media.audio.packing import pack_clips

    packed = pack_clips(clips, encoder.parakeet_config.audio_config())
    assert packed is not None
    rows: Tensor = encoder(packed).index_select(0, packed.row_index)
    return rows


def gradients_of(model: Any, config: Any) -> "dict[str, Tensor]":
    """Gradients of transformers' encoder, by our names and in our form."""
    from megatron_mimo.modules.parakeet.weights import name_table

    parameters = dict(model.named_parameters())
    return {
        entry.ours: entry.join([parameters[name].grad for name in entry.theirs])
        for entry in name_table(config)
        if set(entry.theirs) <= set(parameters)
    }
