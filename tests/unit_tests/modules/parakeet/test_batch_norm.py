"""Statistics of all clips of a microbatch, against torch's batch norm, on several ranks too."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit_tests.modules.parakeet.peer import difference

CHANNELS, SIZES = 12, (5, 0, 17, 1)
UPDATES = 2


def inputs(step: int) -> Any:
    """Rows of all ranks, far from zero."""
    import torch

    random = torch.Generator().manual_seed(step)
    return 3 + 2 * torch.randn(sum(SIZES), CHANNELS, generator=random, dtype=torch.float64)


def normed(tp: int, dp: int) -> dict[str, Any]:
    """This rank's place, its outputs and gradients, and the running statistics."""
    import torch

    from megatron_mimo.modules.parakeet.batch_norm import BatchNorm
    from tests.unit_tests.modules.parakeet.test_parakeet_layouts import groups_of

    groups = groups_of(tp, 1, dp)
    norm = BatchNorm(CHANNELS, torch.float64, groups.pg_collection.tp, groups.pg_collection.dp)
    channels = slice(groups.place.tp * CHANNELS // tp, (groups.place.tp + 1) * CHANNELS // tp)
    rank = groups.pg_collection.dp.rank()
    sizes = SIZES if dp > 1 else (sum(SIZES),)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, CHANNELS)[channels])
        norm.bias.copy_(torch.linspace(-1, 1, CHANNELS)[channels])
    outputs, gradients = [], []
    for step in range(UPDATES):
        x = inputs(step)[own, channels].clone().requires_grad_()
        if not len(x):
            # As a rank without clips does.
            norm.idle(backward=False)
            norm.idle(backward=True)
            outputs.append(x.detach())
            gradients.append(x.detach())
            continue
        output = norm(x)
        output.backward(inputs(10 + step)[own, channels])
        outputs.append(output.detach())
        gradients.append(x.grad)
    return {
        "own": own,
        "channels": channels,
        "outputs": torch.stack(outputs),
        "gradients": torch.stack(gradients),
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "mean": norm.running_mean,
        "variance": norm.running_var,
        "batches": int(norm.num_batches_tracked),
    }


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (1, 4), (3, 1)])
def test_statistics_are_those_of_all_rows(run_ranks: Callable[..., list], tp: int, dp: int) -> None:
    import torch

    torch_norm = torch.nn.BatchNorm1d(CHANNELS).double()
    with torch.no_grad():
        torch_norm.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        torch_norm.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    wanted, slopes = [], []
    for step in range(UPDATES):
        x = inputs(step).requires_grad_()
        output = torch_norm(x)
        output.backward(inputs(10 + step))
        wanted.append(output.detach())
        slopes.append(x.grad)
    outputs, gradients = torch.full_like(torch.stack(wanted), torch.nan), torch.stack(slopes) * 0
    weight, bias = torch.zeros(CHANNELS).double(), torch.zeros(CHANNELS).double()
    for rank in run_ranks(tp * dp, normed, tp, dp):
        place = (slice(None), rank["own"], rank["channels"])
        outputs[place], gradients[place] = rank["outputs"], rank["gradients"]
        # Data-parallel ranks have shares of them, which are summed as those of any weight are.
        if rank["weight"] is not None:
            weight[rank["channels"]] += rank["weight"]
            bias[rank["channels"]] += rank["bias"]
        # Equal on every rank.
        assert difference(rank["mean"].double(), torch_norm.running_mean) < 1e-6
        assert difference(rank["variance"].double(), torch_norm.running_var) < 1e-6
        assert rank["batches"] == UPDATES
    assert difference(outputs, torch.stack(wanted)) < 1e-9
    assert difference(gradients, torch.stack(slopes)) < 1e-9
    assert difference(weight, torch_norm.weight.grad) < 1e-9
    assert difference(bias, torch_norm.bias.grad) < 1e-9


def without_clips(dp: int) -> list[float]:
    """Running statistics after a microbatch in which no rank has clips."""
    import torch

    from megatron_mimo.modules.parakeet.batch_norm import BatchNorm
    from tests.unit_tests.modules.parakeet.test_parakeet_layouts import groups_of

    groups = groups_of(1, 1, dp).pg_collection
    norm = BatchNorm(2, torch.float32, groups.tp, groups.dp)
    norm.idle(backward=False)
    norm.idle(backward=True)
    return [float(value) for buffer in norm.buffers() for value in buffer.flatten()]


def test_no_clip_anywhere_changes_nothing(run_ranks: Callable[..., list]) -> None:
    assert run_ranks(2, without_clips, 2) == [[0, 0, 1, 1, 0]] * 2


def followed(statistics: str) -> list[float]:
    """How far the encoder's running statistics move in training, in evaluation and while frozen."""
    import torch

    from megatron_mimo.modules.parakeet.config import ParakeetConfig
    from megatron_mimo.modules.parakeet.encoder import ParakeetEncoder
    from megatron_mimo.runtime.solo import solo_groups
    from tests.unit_tests.modules.parakeet.peer import clips_of, packed_rows

    config = ParakeetConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=16,
        subsampling_conv_channels=4,
        num_mel_bins=8,
        batch_norm=statistics,  # type: ignore[arg-type]
        init_method_std=0.3,
    )
    encoder = ParakeetEncoder(config, solo_groups(), torch.float32)
    clips, moved = clips_of((160 * 20, 160 * 8), config.audio_config()), []
    for prepare in (encoder.train, encoder.eval, encoder.freeze, encoder.train):
        prepare()
        before = [buffer.clone() for buffer in encoder.buffers()]
        packed_rows(encoder, clips)
        moved.append(
            max(
                float((was - now).abs().max())
                for was, now in zip(before, encoder.buffers(), strict=True)
            )
        )
    return moved


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_running_statistics_follow_in_training_only(
    run_ranks: Callable[..., list], statistics: str
) -> None:
    (moved,) = run_ranks(1, followed, statistics)
    assert (moved[0] > 0) == (statistics == "batch")
    assert moved[1:] == [0, 0, 0]
