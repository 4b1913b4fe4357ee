"""Operations of Parakeet and its projector: counted by formula, and by torch."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_mimo.modules.adapter import FlopsContext
from megatron_mimo.modules.parakeet.adapter import ParakeetAdapter
from megatron_mimo.modules.parakeet.config import ParakeetConfig, ParakeetModuleConfig
from megatron_mimo.modules.parakeet.flops import AudioWork, audio_work
from megatron_mimo.modules.projector.config import ProjectorConfig
from tests.unit_tests.modules.parakeet.peer import clips_of

ROW_WIDTH = 56
CONFIG = ParakeetModuleConfig(
    audio=ParakeetConfig(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=72,
        subsampling_conv_channels=24,
        num_mel_bins=16,
    ),
    audio_projector=ProjectorConfig(ffn_hidden_size=104),
)


def counted(frozen: frozenset[str]) -> tuple[AudioWork, int, int]:
    """Work of some clips, and torch's counts of their forward and backward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_mimo.media.audio.packing import pack_clips
    from megatron_mimo.modules.parakeet.module import ParakeetModule
    from megatron_mimo.runtime.solo import solo_groups

    def convolution_backward(
        gradient: Any, x: Any, w: Any, _bias: Any, *args: Any, out_shape: Any = None, **_: Any
    ) -> int:
        # torch's own count of the gradient of a kernel takes no notice of groups.
        channels, *kernel = w[0], *w[1:]
        each = 2 * gradient[2] * gradient[3] * channels
        for size in kernel:
            each *= size
        return each * sum(bool(wanted) for wanted in args[-1][:2])

    mapping = {torch.ops.aten.convolution_backward: convolution_backward}
    audio = CONFIG.audio.audio_config()
    packed = pack_clips(clips_of((160 * 800, 160 * 640, 160 * 3000), audio), audio)
    assert packed is not None
    module = ParakeetModule(
        CONFIG, solo_groups(), torch.float32, row_width=ROW_WIDTH, frozen=frozen
    )
    with FlopCounterMode(display=False) as forward:
        rows = module(packed)
    with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
        if rows.requires_grad:
            rows.sum().backward()
    work = audio_work(len(packed.features), packed.lengths)
    return work, forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize(
    "frozen", [(), ("audio",), ("audio_projector",), ("audio", "audio_projector")], ids="+".join
)
def test_operations(run_ranks: Callable[..., list], frozen: tuple[str, ...]) -> None:
    parts = frozenset(frozen)
    ((work, *operations),) = run_ranks(1, counted, parts)
    context = FlopsContext(row_width=ROW_WIDTH, vocab_size=8, seq_length=8, frozen=parts)
    flops = ParakeetAdapter().flops(CONFIG, work, context)
    assert operations == pytest.approx([flops.forward, flops.backward], rel=0.01)


def test_no_clip_is_no_work() -> None:
    context = FlopsContext(row_width=ROW_WIDTH, vocab_size=8, seq_length=8)
    assert audio_work(0, ()) == AudioWork()
    assert ParakeetAdapter().flops(CONFIG, AudioWork(), context).total == 0


def test_gradients_pass_a_frozen_projector_to_an_embedding_of_videos_that_trains() -> None:
    from megatron_mimo.modules.radio.adapter import RadioAdapter
    from megatron_mimo.modules.radio.config import RadioModuleConfig, VideoEmbeddingConfig
    from megatron_mimo.modules.radio.flops import ImageWork

    config = RadioModuleConfig(video=VideoEmbeddingConfig())
    work = ImageWork(rows=4)
    counts = []
    for frozen in ({"vision", "projector"}, {"vision", "projector", "video"}):
        context = FlopsContext(row_width=64, vocab_size=1, seq_length=1, frozen=frozenset(frozen))
        counts.append(RadioAdapter().flops(config, work, context))
    # Rows alone: a forward of the projector, and as much for the gradient of its inputs.
    assert counts[0].backward == counts[0].forward > 0
    assert counts[1].backward == 0
