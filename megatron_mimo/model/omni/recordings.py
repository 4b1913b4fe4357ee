"""Processing of videos and audio clips of a folder, as transformers' processor reads it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mimo.media.audio.config import AudioConfig
from megatron_mimo.media.video.config import VideoConfig
from megatron_mimo.model.omni.processor import (
    MERGE,
    PREPROCESSOR,
    PROCESSOR,
    SOUNDS,
    VIDEO_FILE,
    VIDEOS,
    read_json,
    write_json,
)

_CLASS_OF_VIDEOS = "NemotronH_Omni_Reasoning_V3VideoProcessor"
_CLASS_OF_SOUNDS = "ParakeetFeatureExtractor"
# What transformers' classes have where a file says nothing.
_PATCHES, _FRAMES = 1024, 2
# Rows are counted with these, whatever a folder says.
_SUBSAMPLING = {"subsampling_conv_kernel_size": 3, "subsampling_conv_stride": 2}


@dataclass(frozen=True, slots=True)
class _Section:
    """Settings of a file, with its name for messages."""

    where: str
    held: Mapping[str, Any]

    def number(self, name: str, default: float) -> Any:
        """A number that is not negative; null is the default.

        Raises:
            ValueError: It is something else.
        """
        found = self.held.get(name)
        if found is None:
            return default
        whole = isinstance(default, int)
        known = int if whole else (int, float)
        if isinstance(found, bool) or not isinstance(found, known) or found < 0:
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{self.where}: {name} is {found!r}, expected {kind} of at least 0")
        return found

    def switch(self, name: str, default: bool) -> bool:
        """True or false; null is the default.

        Raises:
            ValueError: It is something else.
        """
        found = self.held.get(name)
        if found is None:
            return default
        if not isinstance(found, bool):
            raise ValueError(f"{self.where}: {name} is {found!r}, expected true or false")
        return found

    def channels(
        self, name: str, default: tuple[float, float, float]
    ) -> tuple[float, float, float]:
        """A number for each of the three channels; null is the default.

        Raises:
            ValueError: It is something else.
        """
        found = self.held.get(name)
        if found is None:
            return default
        if (
            not isinstance(found, list)
            or len(found) != 3
            or not all(isinstance(number, int | float) for number in found)
        ):
            raise ValueError(f"{self.where}: {name} is {found!r}, expected three numbers")
        first, second, third = map(float, found)
        return first, second, third

    def require(self, name: str, expected: Any, default: Any) -> None:
        """Refuse another value.

        Raises:
            ValueError: It is another.
        """
        found = self.held.get(name, default)
        if found != expected:
            raise ValueError(f"{self.where}: {name} is {found!r}, expected {expected!r}")


def read_video_processing(folder: Path, images: VideoConfig) -> VideoConfig:
    """How videos become frames, patches and texts.

    Args:
        folder: Folder of the whole model.
        images: What follows from the processing of images, where the folder says nothing else.

    Raises:
        ValueError: A file is not JSON, or a field has a value that is not supported; the message
            names the file and the field.
    """
    whole = _Section(f"{folder / PROCESSOR}", read_json(folder / PROCESSOR))
    videos = _section(folder, VIDEOS, (VIDEO_FILE, PREPROCESSOR))
    if not videos.held:
        return images
    if "video_processor_type" in videos.held:
        videos.require("video_processor_type", _CLASS_OF_VIDEOS, None)
    videos.require("downsample_ratio", MERGE, MERGE)
    # Others would say where the channels of arrays are.
    videos.require("input_data_format", None, None)
    fps, num_frames = videos.number("fps", 0.0), videos.number("num_frames", 0)
    if not videos.switch("do_sample_frames", False):
        fps, num_frames = 0.0, 0
    frames = whole.number("video_temporal_patch_dim", _FRAMES)
    model = _Section(f"{folder / 'config.json'}", read_json(folder / "config.json"))
    model.require("video_temporal_patch_size", frames, _FRAMES)
    return _made(
        VideoConfig,
        videos.where,
        fps=float(fps),
        num_frames=num_frames,
        temporal_patch=frames,
        target_patches=videos.number("video_target_num_patches", _PATCHES),
        keep_aspect=videos.switch("video_maintain_aspect_ratio", True),
        patch_dim=videos.number("patch_size", 16),
        merge=round(1 / MERGE),
        pixel_mean=videos.channels("norm_mean", images.pixel_mean),
        pixel_std=videos.channels("norm_std", images.pixel_std),
    )


def read_audio_processing(folder: Path) -> AudioConfig:
    """How audio clips become mel features and rows.

    Raises:
        ValueError: A file is not JSON, the folder has no audio, or a field has a value that is not
            supported; the message names the file and the field.
    """
    whole = _Section(f"{folder / PROCESSOR}", read_json(folder / PROCESSOR))
    config = folder / "config.json"
    described = read_json(config)
    audio = described.get("audio_config") or described.get("sound_config")
    if not isinstance(audio, dict):
        raise ValueError(f"{config}: audio_config is {audio!r}: the folder's model takes no audio")
    model = _Section(f"{config}: audio_config", audio)
    sounds = _section(folder, SOUNDS, (PREPROCESSOR,))
    if "feature_extractor_type" in sounds.held:
        sounds.require("feature_extractor_type", _CLASS_OF_SOUNDS, None)
    for name, value in _SUBSAMPLING.items():
        model.require(name, value, value)
    rate, hop = sounds.number("sampling_rate", 16_000), sounds.number("hop_length", 160)
    factor, bins = model.number("subsampling_factor", 8), model.number("num_mel_bins", 80)
    # The processor counts rows with its own numbers.
    whole.require("audio_sampling_rate", rate, 16_000)
    whole.require("audio_hop_length", hop, 160)
    whole.require("audio_subsampling_factor", factor, 8)
    if sounds.held:
        sounds.require("feature_size", bins, 80)
    return _made(
        AudioConfig,
        sounds.where,
        sampling_rate=rate,
        hop_length=hop,
        n_fft=sounds.number("n_fft", 512),
        win_length=sounds.number("win_length", 400),
        preemphasis=float(sounds.number("preemphasis", 0.97))
        if sounds.held.get("preemphasis", 0.97) is not None
        else 0.0,
        num_mel_bins=bins,
        subsampling_factor=factor,
        conv_kernel_size=model.number("conv_kernel_size", 9),
    )


def write_recordings(
    folder: Path, *, video: VideoConfig | None = None, audio: AudioConfig | None = None
) -> None:
    """Say in a folder's processor_config.json how videos and clips are processed.

    Other fields of the file stay. The bound on the number of frames is none of transformers'.

    Args:
        folder: Folder with the file, which `write_processor` wrote.
        video: Processing of videos; None leaves what the file says.
        audio: Processing of clips; None leaves what the file says.

    Raises:
        ValueError: The file is not JSON.
    """
    found = read_json(folder / PROCESSOR)
    if video is not None:
        found["video_temporal_patch_dim"] = video.temporal_patch
        found[VIDEOS] = found.get(VIDEOS, {}) | _of_videos(video)
    if audio is not None:
        found["audio_sampling_rate"] = audio.sampling_rate
        found["audio_hop_length"] = audio.hop_length
        found["audio_subsampling_factor"] = audio.subsampling_factor
        found[SOUNDS] = found.get(SOUNDS, {}) | _of_sounds(audio)
    write_json(folder / PROCESSOR, found)


def _of_videos(config: VideoConfig) -> dict[str, Any]:
    return {
        "video_processor_type": _CLASS_OF_VIDEOS,
        "norm_mean": list(config.pixel_mean),
        "norm_std": list(config.pixel_std),
        "patch_size": config.patch_dim,
        "downsample_ratio": MERGE,
        "video_target_num_patches": config.target_patches,
        "video_maintain_aspect_ratio": config.keep_aspect,
        "do_sample_frames": bool(config.fps or config.num_frames),
        "fps": config.fps or None,
        "num_frames": config.num_frames or None,
    }


def _of_sounds(config: AudioConfig) -> dict[str, Any]:
    return {
        "feature_extractor_type": _CLASS_OF_SOUNDS,
        "feature_size": config.num_mel_bins,
        "sampling_rate": config.sampling_rate,
        "hop_length": config.hop_length,
        "n_fft": config.n_fft,
        "win_length": config.win_length,
        "preemphasis": config.preemphasis,
    }


def _section(folder: Path, name: str, files: tuple[str, ...]) -> _Section:
    """The settings of a part, where transformers looks for them: the section, then older files."""
    held = read_json(folder / PROCESSOR).get(name)
    if isinstance(held, dict):
        return _Section(f"{folder / PROCESSOR}: {name}", held)
    for file in files:
        if held := read_json(folder / file):
            return _Section(f"{folder / file}", held)
    return _Section(f"{folder / PROCESSOR}: {name}", {})


def _made[Config](kind: type[Config], where: str, **values: Any) -> Config:
    """Settings of a kind, whose own checks name the file."""
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
