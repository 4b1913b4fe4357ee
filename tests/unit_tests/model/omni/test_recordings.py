"""Settings of videos and clips in a folder against the processors that transformers loads of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.media.audio.config import AudioConfig
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.model.omni.recordings import (
    read_audio_processing,
    read_video_processing,
    write_recordings,
)

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
VIDEO = {"norm_mean": MEAN, "norm_std": STD}
IMAGES = VideoConfig(pixel_mean=(0.9, 0.9, 0.9))
AUDIO = {"num_mel_bins": 80}


def written(folder: Path, **sections: Any) -> Path:
    """A folder with a processor_config.json of these fields, and a model with audio."""
    config = sections.pop("config", {"audio_config": AUDIO})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text(json.dumps(sections))
    return folder


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import ParakeetFeatureExtractor
    from transformers.models.nemotron_h_omni.video_processing_nemotron_h_omni import (
        NemotronH_Omni_Reasoning_V3VideoProcessor as Processor,
    )

    folder = written(tmp_path, video_processor=VIDEO)
    video, audio = read_video_processing(folder, IMAGES), read_audio_processing(folder)
    theirs = Processor.from_pretrained(folder)
    assert (video.patch_dim, video.target_patches, video.keep_aspect) == (
        theirs.patch_size, theirs.video_target_num_patches, theirs.video_maintain_aspect_ratio
    )  # fmt: skip
    assert video.merge == theirs._downsample_factor
    assert [*video.pixel_mean] == MEAN and [*video.pixel_std] == STD
    # Without do_sample_frames every frame is used.
    assert not theirs.do_sample_frames and (video.fps, video.num_frames) == (0, 0)
    extractor = ParakeetFeatureExtractor()
    for ours, name in (
        (audio.num_mel_bins, "feature_size"),
        (audio.sampling_rate, "sampling_rate"),
        (audio.hop_length, "hop_length"),
        (audio.n_fft, "n_fft"),
        (audio.win_length, "win_length"),
        (audio.preemphasis, "preemphasis"),
    ):
        assert ours == getattr(extractor, name)


VIDEOS = [
    VideoConfig(fps=1.5, temporal_patch=3, target_patches=77, keep_aspect=False),
    VideoConfig(num_frames=9, patch_dim=14),
    VideoConfig(),
]
AUDIOS = [
    AudioConfig(),
    AudioConfig(
        sampling_rate=8_000, hop_length=80, n_fft=256, win_length=200, preemphasis=0.5,
        num_mel_bins=40, subsampling_factor=4, conv_kernel_size=5,
    ),
]  # fmt: skip


@pytest.mark.parametrize("video", VIDEOS, ids=["fps", "number", "all"])
def test_what_is_written_is_read_again(tmp_path: Path, video: VideoConfig) -> None:
    from transformers.models.nemotron_h_omni.video_processing_nemotron_h_omni import (
        NemotronH_Omni_Reasoning_V3VideoProcessor as Processor,
    )

    for audio in AUDIOS:
        config = {
            "video_temporal_patch_size": video.temporal_patch,
            "audio_config": {
                "num_mel_bins": audio.num_mel_bins,
                "subsampling_factor": audio.subsampling_factor,
                "conv_kernel_size": audio.conv_kernel_size,
            },
        }
        folder = written(tmp_path, kept=1, video_processor={"other": 2}, config=config)
        write_recordings(folder, video=video, audio=audio)
        assert read_video_processing(folder, IMAGES) == video
        assert read_audio_processing(folder) == audio
        found = json.loads((folder / "processor_config.json").read_text())
        assert found["kept"] == 1 and found["video_processor"]["other"] == 2
        theirs = Processor.from_pretrained(folder)
        assert theirs.patch_size == video.patch_dim
        assert bool(theirs.do_sample_frames) == bool(video.fps or video.num_frames)
        assert (theirs.fps or 0, theirs.num_frames or 0) == (video.fps, video.num_frames)


def test_what_is_not_said_follows_from_images(tmp_path: Path) -> None:
    assert read_video_processing(written(tmp_path), IMAGES) is IMAGES
    folder = written(tmp_path, video_processor={"patch_size": 8})
    assert read_video_processing(folder, IMAGES).pixel_mean == IMAGES.pixel_mean


def test_older_files_are_read_where_transformers_looks(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(VIDEO | {"patch_size": 8}))
    assert read_video_processing(folder, IMAGES).patch_dim == 8
    (folder / "video_preprocessor_config.json").write_text(json.dumps(VIDEO | {"patch_size": 4}))
    assert read_video_processing(folder, IMAGES).patch_dim == 4
    written(tmp_path, video_processor=VIDEO | {"patch_size": 2})
    assert read_video_processing(folder, IMAGES).patch_dim == 2


VIDEO_FLAWS: dict[str, tuple[dict[str, Any], str]] = {
    "mean": ({"norm_mean": [1, 2]}, r"video_processor: norm_mean is \[1, 2\], expected three"),
    "ratio": ({"downsample_ratio": 0.25}, "downsample_ratio is 0.25, expected 0.5"),
    "class": ({"video_processor_type": "Other"}, "video_processor_type is 'Other'"),
    "fps": ({"fps": "2", "do_sample_frames": True}, "fps is '2', expected a number"),
    "both": ({"fps": 2, "num_frames": 3, "do_sample_frames": True}, "fps is 2.0 and num_frames 3"),
    "switch": ({"do_sample_frames": 1}, "do_sample_frames is 1, expected true or false"),
    "patches": ({"video_target_num_patches": 0}, "target_patches is 0"),
    "channels": ({"input_data_format": "channels_last"}, "input_data_format"),
}


@pytest.mark.parametrize("name", list(VIDEO_FLAWS))
def test_unsupported_videos_are_refused_by_field(tmp_path: Path, name: str) -> None:
    fields, message = VIDEO_FLAWS[name]
    folder = written(tmp_path, video_processor=VIDEO | fields)
    with pytest.raises(ValueError, match=message) as caught:
        read_video_processing(folder, IMAGES)
    assert "processor_config.json" in str(caught.value)


def test_processor_and_model_take_the_same_groups(tmp_path: Path) -> None:
    folder = written(tmp_path, video_processor=VIDEO, video_temporal_patch_dim=4)
    with pytest.raises(ValueError, match="video_temporal_patch_size is 2, expected 4"):
        read_video_processing(folder, IMAGES)


AUDIO_FLAWS: dict[str, tuple[dict[str, Any], str]] = {
    "no audio": ({"config": {}}, "audio_config is None: the folder's model takes no audio"),
    "bins": ({"feature_extractor": {"feature_size": 128}}, "feature_size is 128, expected 80"),
    "rate": ({"audio_sampling_rate": 8000}, "audio_sampling_rate is 8000, expected 16000"),
    "hop": ({"feature_extractor": {"hop_length": 80}}, "audio_hop_length is 160, expected 80"),
    "factor": ({"audio_subsampling_factor": 4}, "audio_subsampling_factor is 4, expected 8"),
    "class": (
        {"feature_extractor": {"feature_extractor_type": "WhisperFeatureExtractor"}},
        "feature_extractor_type is 'WhisperFeatureExtractor'",
    ),
    "kernel": (
        {"config": {"audio_config": {"subsampling_conv_kernel_size": 5}}},
        "audio_config: subsampling_conv_kernel_size is 5, expected 3",
    ),
    "odd": ({"feature_extractor": {"n_fft": 511}}, "n_fft is 511: expected an even"),
}


@pytest.mark.parametrize("name", list(AUDIO_FLAWS))
def test_unsupported_clips_are_refused_by_field(tmp_path: Path, name: str) -> None:
    fields, message = AUDIO_FLAWS[name]
    folder = written(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        read_audio_processing(folder)
