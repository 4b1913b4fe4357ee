"""Clips in one pack: where frames and rows of each stand, and what is between them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.media.audio.clip import EncodedClip
from megatron_mimo.media.audio.config import AudioConfig
from megatron_mimo.media.audio.packing import pack_clips

CONFIGS = st.builds(
    AudioConfig,
    num_mel_bins=st.just(2),
    subsampling_factor=st.sampled_from([2, 4, 8, 16]),
    conv_kernel_size=st.sampled_from([1, 3, 9, 31]),
)


def clip_of(frames: int, number: int, config: AudioConfig) -> EncodedClip:
    """A clip whose features say which clip and frame they are of; the last is masked."""
    features = np.stack(
        [np.full(frames, number + 1), np.arange(frames) + 1], axis=1, dtype=np.float32
    )
    features[-1] = 0
    return EncodedClip(
        samples=(frames - 1) * config.hop_length, rows=config.num_rows(frames), features=features
    )


@given(st.lists(st.integers(1, 70), min_size=1, max_size=8), CONFIGS)
def test_where_everything_stands(frames: list[int], config: AudioConfig) -> None:
    clips = [clip_of(count, number, config) for number, count in enumerate(frames)]
    packed = pack_clips(clips, config)
    assert packed is not None
    assert packed.lengths == tuple(sorted(clip.rows for clip in clips))
    assert packed.num_tokens == sum(clip.rows for clip in clips)
    # Frames of a clip are together, in order, and begin at a position of every level.
    owner, frame = packed.features.T.long()
    factor, reach = config.subsampling_factor, config.conv_kernel_size // 2
    starts = {}
    for number, count in enumerate(frames, start=1):
        places = (owner == number).nonzero().flatten()
        assert frame[places].tolist() == list(range(1, count))
        if count > 1:
            starts[number] = int(places[0])
            assert starts[number] % factor == 0
    # At each level, positions outside of gaps are those that valid frames give, clip by clip; and
    # a stride sees a zero before and behind each clip.
    positions = len(owner)
    for level, gaps in enumerate(packed.gaps, start=1):
        positions //= 2
        taken = set(range(positions)) - set(gaps.tolist())
        wanted = set()
        for number, start in starts.items():
            count = -(-(frames[number - 1] - 1) // 2**level)
            span = set(range(start // 2**level, start // 2**level + count))
            assert not span & wanted
            if level < len(packed.gaps):
                assert start // 2**level - 1 not in wanted
            wanted |= span
        assert taken == wanted
    assert positions * factor == len(owner)
    # Rows of a clip in the given order, at its positions of the last level.
    assert sorted(packed.row_index.tolist()) == list(range(packed.num_tokens))
    slots = packed.row_slots[packed.row_index].split([clip.rows for clip in clips])
    for number, (clip, found) in enumerate(zip(clips, slots, strict=True), start=1):
        assert found.tolist() == list(range(int(found[0]), int(found[0]) + clip.rows))
        if number in starts:
            assert int(found[0]) == starts[number] // factor
    # On the line of the convolutions, no kernel covers rows of two clips.
    own = np.repeat(np.arange(len(packed.lengths)), packed.lengths)
    line = np.full(packed.conv_length, -1)
    seen = [r < v for n, v in zip(packed.lengths, packed.valid, strict=True) for r in range(n)]
    line[packed.conv_slots[torch.tensor(seen)].numpy()] = own[seen]
    assert (packed.conv_slots[~torch.tensor(seen)] == packed.conv_length - 1).all()
    for row, first in enumerate(packed.conv_rows.tolist()):
        assert first + 2 * reach < packed.conv_length - 1
        covered = line[first : first + 2 * reach + 1]
        assert set(covered.tolist()) <= {-1, own[row]}
        assert covered[reach] == (own[row] if seen[row] else -1)


def test_no_clip_is_no_pack() -> None:
    assert pack_clips([], AudioConfig()) is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("subsampling_factor", 12, "subsampling_factor is 12: expected a power of two"),
        ("conv_kernel_size", 4, "conv_kernel_size is 4: expected an odd number"),
    ],
)
def test_settings_that_cannot_be_packed(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AudioConfig(**{field: value})
