"""Rows and gradients of Parakeet against transformers' encoder on each clip alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit_tests.modules.parakeet.peer import (
    SAMPLES,
    alone,
    built,
    clips_of,
    difference,
    gradients_of,
    packed_rows,
    write_parakeet,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "as Nemotron Omni": {},
    "as Parakeet": {"attention_bias": True, "scale_input": True, "num_mel_bins": 80},
    "without biases, factor 4": {
        "convolution_bias": False,
        "subsampling_factor": 4,
        "conv_kernel_size": 5,
        "num_hidden_layers": 3,
    },
    "one level, gelu": {
        "subsampling_factor": 2,
        "num_mel_bins": 6,
        "conv_kernel_size": 3,
        "hidden_act": "gelu",
        "num_attention_heads": 1,
    },
    "wide heads, factor 16, long kernel": {
        "hidden_size": 160,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "subsampling_factor": 16,
        "conv_kernel_size": 31,
    },
}


def compared(folder: Path, fields: dict[str, Any], dtype: str) -> dict[str, float]:
    """Relative differences of rows, and of the gradient of each parameter."""
    import torch

    model = write_parakeet(folder, **fields).to(getattr(torch, dtype))
    encoder = built(folder, model.dtype).train()
    # As many rows, whatever the factor.
    factor = encoder.parakeet_config.subsampling_factor
    samples = [each * factor // 8 for each in SAMPLES]
    clips = clips_of(samples, encoder.parakeet_config.audio_config())
    rows = packed_rows(encoder, clips)
    wanted = torch.cat([alone(model, clip) for clip in clips])
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3))
    (wanted * weights).sum().backward()
    (rows * weights).sum().backward()
    found = {"rows": difference(rows, wanted)}
    theirs = gradients_of(model, encoder.parakeet_config)
    for name, parameter in encoder.named_parameters():
        found[name] = difference(parameter.grad, theirs[name])
    return found


# Statistics and sinusoids are float32 in either.
@pytest.mark.parametrize(
    ("dtype", "rows", "gradients"), [("float32", 1e-5, 1e-4), ("float64", 1e-6, 1e-6)]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_and_gradients(
    run_ranks: Callable[..., list],
    tmp_path: Path,
    name: str,
    dtype: str,
    rows: float,
    gradients: float,
) -> None:
    (found,) = run_ranks(1, compared, tmp_path, CONFIGS[name], dtype)
    assert found.pop("rows") < rows
    assert max(found.values()) < gradients, {k: d for k, d in found.items() if d >= gradients}


def in_training(folder: Path, samples: int) -> dict[str, float]:
    """Differences to transformers in training mode, where a clip has statistics of its own."""
    import torch

    model = write_parakeet(folder).double().train()
    encoder = built(folder, torch.float64, batch_norm="batch").train()
    clips = clips_of([samples], encoder.parakeet_config.audio_config())
    rows, wanted = packed_rows(encoder, clips), alone(model, clips[0])
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3)).double()
    (wanted * weights).sum().backward()
    (rows * weights).sum().backward()
    found = {"rows": difference(rows, wanted)}
    theirs = gradients_of(model, encoder.parakeet_config)
    for name, parameter in encoder.named_parameters():
        # Before a norm over rows, what is added to every row has no gradient but rounding.
        if not name.endswith("depthwise.bias"):
            found[name] = difference(parameter.grad, theirs[name])
    states, buffers = model.state_dict(), dict(encoder.named_buffers())
    for layer in range(encoder.parakeet_config.num_layers):
        for kind in ("running_mean", "running_var"):
            mine = buffers[f"layers.{layer}.convolution.batch_norm.{kind}"]
            found[f"{layer} {kind}"] = difference(
                mine.double(), states[f"layers.{layer}.conv.norm.{kind}"]
            )
    return found


# With the extra row, which counts among the statistics, and without.
@pytest.mark.parametrize("samples", [160 * 64, 160 * 75])
def test_statistics_of_a_clip(run_ranks: Callable[..., list], tmp_path: Path, samples: int) -> None:
    (found,) = run_ranks(1, in_training, tmp_path, samples)
    assert max(found.values()) < 1e-6, {key: far for key, far in found.items() if far >= 1e-6}


def mixed(folder: Path) -> tuple[float, float, float, list[int]]:
    """Differences to one clip at a time, to another order and to padded batches; lengths."""
    import torch

    from megatron_mimo.media.audio.packing import pack_clips
    from megatron_mimo.modules.parakeet import attention

    write_parakeet(folder)
    encoder = built(folder)
    config = encoder.parakeet_config.audio_config()
    # Lengths that are near enough to share a batch.
    clips = clips_of((*SAMPLES, 160 * 60, 160 * 56, 160 * 55, 160 * 63), config)
    with torch.no_grad():
        rows = packed_rows(encoder, clips).split([clip.rows for clip in clips])
        singly = [packed_rows(encoder, [clip]) for clip in clips]
        turned = packed_rows(encoder, clips[::-1]).split([clip.rows for clip in clips[::-1]])[::-1]
    packed = pack_clips(clips, config)
    assert packed is not None
    plan = attention.plan_batches
    gradients = []
    for padding in (0.0, 0.5):
        attention.plan_batches = lambda *args, share=padding: plan(*args[:2], share)  # type: ignore
        encoder.zero_grad()
        packed_rows(encoder, clips).square().sum().backward()
        gradients.append(torch.cat([each.grad.flatten() for each in encoder.parameters()]))
    attention.plan_batches = plan
    sizes = [batch.count for batch in plan(packed.lengths, packed.valid, 0.5)]
    return (
        max(difference(*pair) for pair in zip(rows, singly, strict=True)),
        max(difference(*pair) for pair in zip(rows, turned, strict=True)),
        difference(*gradients),
        sizes,
    )


def test_company_order_and_batches_do_not_matter(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    ((singly, turned, padded, sizes),) = run_ranks(1, mixed, tmp_path)
    assert singly < 2e-6
    assert turned < 2e-6
    assert padded < 1e-5
    # Clips of different lengths shared batches.
    assert max(sizes) > 3


def leaks(folder: Path) -> dict[int, set[int]]:
    """Clip that is replaced by a loud one -> clips whose rows or gradients have changed."""
    import torch

    write_parakeet(folder)
    encoder = built(folder)
    clips = clips_of((*SAMPLES, 160 * 8), encoder.parakeet_config.audio_config())
    lengths = [clip.rows for clip in clips]

    def run(inputs: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(packed_rows(encoder, inputs).split(lengths))

    before = run(clips)
    changed: dict[int, set[int]] = {}
    for loud, clip in enumerate(clips):
        if clip.samples < 160:  # No valid frame.
            continue
        features = clip.features * 100
        other = type(clip)(samples=clip.samples, rows=clip.rows, features=features)
        after = run([*clips[:loud], other, *clips[loud + 1 :]])
        changed[loud] = {
            number
            for number, (was, now) in enumerate(zip(before, after, strict=True))
            if not was.equal(now)
        }
    return changed


def test_nothing_leaks_into_another_clip(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    (changed,) = run_ranks(1, leaks, tmp_path)
    assert len(changed) == len(SAMPLES)
    assert all(numbers == {loud} for loud, numbers in changed.items()), changed


def rounded(folder: Path) -> tuple[float, float, str]:
    """Distance in bfloat16 to float32, of ours and of transformers; dtype of the rows."""
    import torch

    model = write_parakeet(folder, initializer_range=0.05)
    exact, encoder = built(folder), built(folder, torch.bfloat16).train()
    clips = clips_of(SAMPLES, encoder.parakeet_config.audio_config())
    with torch.no_grad():
        wanted = packed_rows(exact, clips)
        found = packed_rows(encoder, clips)
        theirs = torch.cat([alone(model.bfloat16(), clip) for clip in clips])
    rows = packed_rows(encoder, clips)
    rows.float().square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.bfloat16, name
        assert parameter.grad.isfinite().all(), name
    error, their_error = (
        (each.float() - wanted).norm() / wanted.norm() for each in (found, theirs)
    )
    return float(error), float(their_error), str(found.dtype)


def test_bfloat16_is_as_near_as_transformers(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    ((error, their_error, dtype),) = run_ranks(1, rounded, tmp_path)
    assert dtype == "torch.bfloat16"
    assert 0 < error < 1.2 * their_error


def frozen(folder: Path) -> tuple[bool, bool]:
    """Whether a frozen encoder's rows are outside of a graph, and it stays in evaluation."""
    write_parakeet(folder)
    encoder = built(folder)
    encoder.freeze()
    encoder.train()
    rows = packed_rows(encoder, clips_of((160 * 9,), encoder.parakeet_config.audio_config()))
    return not rows.requires_grad, not any(each.training for each in encoder.modules())


def test_a_frozen_encoder_stays_in_evaluation(
    run_ranks: Callable[..., list], tmp_path: Path
) -> None:
    assert run_ranks(1, frozen, tmp_path) == [(True, True)]


def operators(samples: tuple[int, ...]) -> Any:
    """Numbers of operators of a forward and a backward, by name."""
    from collections import Counter

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_mimo.media.audio.packing import pack_clips
    from megatron_mimo.modules.parakeet.config import ParakeetConfig
    from megatron_mimo.modules.parakeet.encoder import ParakeetEncoder
    from megatron_mimo.runtime.solo import solo_groups

    counts: Counter[str] = Counter()

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            counts[str(func)] += 1
            return func(*args, **(kwargs or {}))

    config = ParakeetConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=16,
        subsampling_conv_channels=4,
        num_mel_bins=8,
    )
    encoder = ParakeetEncoder(config, solo_groups(), torch.float32)
    packed = pack_clips(clips_of(samples, config.audio_config()), config.audio_config())
    assert packed is not None
    encoder(packed)  # Sinusoids and plans are made once.
    with Counted():
        encoder(packed).sum().backward()
    return counts


def test_operators_do_not_grow_with_clips(run_ranks: Callable[..., list]) -> None:
    (few,) = run_ranks(1, operators, (160 * 20,) * 2)
    (many,) = run_ranks(1, operators, (160 * 20,) * 50)
    assert few == many
    assert not [name for name in many if "_local_scalar_dense" in name or "nonzero" in name]
