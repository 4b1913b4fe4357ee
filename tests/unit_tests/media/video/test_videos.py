"""Videos against transformers' processor of Nemotron H Omni models."""

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_mimo.media.video.clip import EncodedVideo
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.media.video.decode import decode_or_black
from megatron_mimo.media.video.input import VideoInput
from megatron_mimo.media.video.sampling import frame_grid, group_labels, sample_indices
from tests.properties import examples
from tests.unit_tests.media.recorded import frames_of, pictures, video

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
FRAMES = pictures(31, 100, 74)
FILES: dict[str, Any] = {
    "mp4": {},
    "mp4 with one key frame": {"gop": 99},
    "mkv": {"container": "matroska"},
    "webm": {"container": "webm", "codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    "avi": {"container": "avi", "codec": "mpeg4"},
    "avi without time stamps": {"container": "avi", "codec": "mpeg4", "options": {"bf": "2"}},
    "mov": {"container": "mov", "codec": "mjpeg", "pixels": "yuvj420p"},
}
RULES: dict[str, dict[str, Any]] = {
    "every frame": {},
    "2 a second": {"fps": 2},
    "2.5 a second": {"fps": 2.5},
    "5 frames": {"num_frames": 5},
    "1 frame": {"num_frames": 1},
}


def small(**fields: Any) -> VideoConfig:
    return VideoConfig(
        **{"target_patches": 24, "patch_dim": 8, "pixel_mean": MEAN, "pixel_std": STD, **fields}
    )


def processor(config: VideoConfig) -> Any:
    from transformers.models.nemotron_h_omni.video_processing_nemotron_h_omni import (
        NemotronH_Omni_Reasoning_V3VideoProcessor as Processor,
    )

    rule = {"fps": config.fps or None, "num_frames": config.num_frames or None}
    return Processor(
        norm_mean=list(config.pixel_mean),
        norm_std=list(config.pixel_std),
        patch_size=config.patch_dim,
        video_target_num_patches=config.target_patches,
        video_maintain_aspect_ratio=config.keep_aspect,
        do_sample_frames=any(rule.values()),
        **{name: value for name, value in rule.items() if value},
    )


def written(made: Any, metadata: Any, temporal_patch: int) -> str:
    """What transformers' processor writes for a video, with @ for a row."""
    from transformers.models.nemotron_h_omni.processing_nemotron_h_omni import (
        NemotronH_Omni_Reasoning_V3Processor as Processor,
    )

    names = SimpleNamespace(
        image_start_token="<img>",
        image_token="@",
        image_end_token="</img>",
        video_temporal_patch_dim=temporal_patch,
    )
    text: str = Processor.replace_video_token(
        names, made, 0, num_frames=sum(made["num_patches"]), video_metadata=metadata
    )
    return text


def by_transformers(
    frames: NDArray[np.uint8], rate: float | None, config: VideoConfig
) -> tuple[torch.Tensor, str]:
    """Patches that the model packs of the processor's pixels, [T, F*3*P*P], and the text."""
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(
        total_num_frames=len(frames), fps=rate, frames_indices=list(range(len(frames)))
    )
    made = processor(config)(
        videos=[frames], video_metadata=[metadata], return_tensors="pt", return_metadata=True
    )
    pixels = made["pixel_values_videos"]
    missing = -len(pixels) % config.temporal_patch
    pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
    number, channels, height, width = pixels.shape
    # The model's own line, and its embedding's cut into patches.
    packed = pixels.reshape(
        number // config.temporal_patch, config.temporal_patch * channels, height, width
    )
    patches = torch.nn.functional.unfold(packed, config.patch_dim, stride=config.patch_dim)
    text = written(made, made["video_metadata"][0], config.temporal_patch)
    return patches.transpose(1, 2).flatten(0, 1), text


def normalised(item: EncodedVideo, config: VideoConfig) -> torch.Tensor:
    assert item.patches is not None
    pixels = torch.from_numpy(item.patches).view(len(item.patches), config.temporal_patch, 3, -1)
    mean, std = (torch.tensor(values).view(1, 1, 3, 1) for values in (MEAN, STD))
    return ((pixels / 255.0 - mean) / std).flatten(1)


def text_of(kind: VideoInput, item: EncodedVideo) -> str:
    return "".join(
        label + "".join("@" * piece if isinstance(piece, int) else piece for piece in layout)
        for label, layout in kind.runs(item)
    )


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("name", list(FILES))
def test_videos_are_those_of_transformers(name: str, rule: str) -> None:
    file = video(FRAMES, **FILES[name])
    config = small(**RULES[rule])
    kind = VideoInput(config=config)
    shape = kind.examine(file)
    assert (shape.total, shape.rate, shape.width, shape.height) == (31, 10.0, 100, 74)
    item, reason = kind.encode(file, shape, with_content=True)
    assert reason is None
    patches, text = by_transformers(frames_of(file), 10.0, config)
    assert text_of(kind, item) == text
    assert torch.equal(normalised(item, config), patches)
    without, _ = kind.encode(file, shape, with_content=False)
    assert (without.grid, without.labels, without.rows) == (item.grid, item.labels, item.rows)
    assert without.patches is None and text.count("@") == item.rows
    assert pickle.loads(pickle.dumps(item)).labels == item.labels


@pytest.mark.parametrize("temporal_patch", [1, 2, 3, 4])
def test_groups_have_any_number_of_frames(temporal_patch: int) -> None:
    config = small(temporal_patch=temporal_patch)
    kind = VideoInput(config=config)
    for number in (1, 3, 5):
        frames = pictures(number, 40, 56)
        item, _ = kind.encode(frames, kind.examine(frames), with_content=True)
        patches, text = by_transformers(frames, None, config)
        assert torch.equal(normalised(item, config), patches)
        # Arrays have no rate, so that no times are written.
        assert text_of(kind, item) == text and "seconds" not in text


def test_sizes_are_those_of_transformers() -> None:
    from transformers.models.nemotron_h_omni.video_processing_nemotron_h_omni import (
        NemotronH_Omni_Reasoning_V3VideoProcessor as Processor,
    )

    random = np.random.default_rng(21)
    for _ in range(3000):
        width, height = np.exp(random.uniform(0, np.log(4000), 2)).astype(int).tolist()
        config = VideoConfig(
            target_patches=int(random.integers(1, 1500)), keep_aspect=bool(random.integers(4))
        )
        theirs = Processor(
            video_target_num_patches=config.target_patches,
            video_maintain_aspect_ratio=config.keep_aspect,
        )._compute_target_patches(height, width)
        assert frame_grid(width, height, config) == theirs[::-1]


@given(
    total=st.integers(1, 5000),
    rate=st.floats(0.5, 240) | st.sampled_from([24000 / 1001, 25.0, 30000 / 1001, 30.0]),
    fps=st.floats(0.1, 60) | st.integers(1, 8),
    num_frames=st.integers(0, 300),
)
@examples(1000)
def test_frames_and_times_are_those_of_transformers(
    total: int, rate: float, fps: float, num_frames: int
) -> None:
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    config = VideoConfig(fps=0 if num_frames else float(fps), num_frames=num_frames)
    metadata = VideoMetadata(total_num_frames=total, fps=rate)
    indices = sample_indices(total, rate, config)
    try:
        expected = default_sample_indices_fn(
            metadata, num_frames=num_frames or None, fps=config.fps or None
        )
    except ValueError:
        # There are fewer frames than asked for.
        expected = np.arange(total)
    assert indices == tuple(expected.tolist())
    metadata.frames_indices = expected
    made = {"num_patches": [1] * len(expected), "num_tokens": [0] * len(expected)}
    lines = written(made, metadata, 2).replace("<img></img>", "").split("\n")
    assert group_labels(indices, rate, 2) == tuple(lines)


def test_a_bound_on_frames_samples_evenly() -> None:
    assert sample_indices(100, 10.0, VideoConfig(max_frames=4)) == (0, 25, 50, 75)
    assert sample_indices(100, 10.0, VideoConfig(fps=1, max_frames=4)) == (0, 25, 50, 75)
    assert sample_indices(3, 10.0, VideoConfig(fps=1, max_frames=4)) == (0,)
    with pytest.raises(ValueError, match="fps is 1.0, and the video has no frame rate"):
        sample_indices(100, None, VideoConfig(fps=1.0))
    with pytest.raises(ValueError, match="fps is 1 and num_frames 2"):
        VideoConfig(fps=1, num_frames=2)


@pytest.mark.parametrize("name", ["mp4", "mkv", "webm", "mov"])
def test_frames_between_key_frames_are_jumped_over(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jumps spare decoding, and give the same frames."""
    from megatron_mimo.media.video import frames as frames_module

    file = video(pictures(120, 48, 32), **(FILES[name] | {"gop": 10}))
    decoded = []
    plain = frames_module.decoded
    monkeypatch.setattr(frames_module, "decoded", lambda packet: decoded.append(1) or plain(packet))
    shape = VideoInput(config=small(num_frames=4)).examine(file)
    made, _ = decode_or_black(file, shape)
    np.testing.assert_array_equal(made, frames_of(file)[[0, 30, 60, 90]])
    assert len(decoded) < 60


def test_a_video_is_a_line_for_each_group() -> None:
    kind = VideoInput(config=small(num_frames=3), tags=("", ""))
    file = video(pictures(9, 48, 48))
    item, _ = kind.encode(file, kind.examine(file), with_content=False)
    assert kind.texts(item) == (
        "Frame 1 sampled at 0.00 seconds and frame 2 sampled at 0.30 seconds: ",
        "Frame 3 sampled at 0.60 seconds: ",
    )
    assert kind.runs(item) == ((item.labels[0], (4,)), (f"\n{item.labels[1]}", (4,)))
    assert kind.feeds == "encoder" and item.rows == 8


def test_mock_videos_fit() -> None:
    config = small(target_patches=16)
    kind = VideoInput(config=config)
    for seed in range(20):
        made = kind.mock(np.random.default_rng(seed), 140)
        (frames,) = made.sources
        item, _ = kind.encode(frames, kind.examine(frames), with_content=True)
        texts = text_of(kind, item) + made.question.removeprefix("<video>") + made.answer
        assert len(texts) < 140
        bright = [np.argwhere(frame[..., 0] == 220).mean(axis=0) for frame in frames]
        step = np.sign(np.round(bright[1] - bright[0])).tolist()
        assert (
            step == {"left": [0, -1], "right": [0, 1], "up": [-1, 0], "down": [1, 0]}[made.answer]
        )
    kind.check_mock(140)
    with pytest.raises(ValueError, match="--seq-length"):
        kind.check_mock(60)
