"""Audio clips against FFmpeg, arithmetic and transformers' feature extractor."""

import io
import pickle
import struct
import wave as wave_files
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_mimo.media.audio import AudioConfig, AudioInput
from megatron_mimo.media.audio.decode import ClipShape, decode_or_silence
from tests.unit_tests.media.recorded import clip, tones, wave_of

INPUT = AudioInput()
RATE = INPUT.config.sampling_rate
LENGTH = 8123


def decoded(file: bytes) -> NDArray[np.float32]:
    made, reason = decode_or_silence(file, INPUT.examine(file), INPUT.config)
    assert reason is None
    return made


def by_transformers(wave: NDArray[np.float32], config: AudioConfig) -> NDArray[Any]:
    from transformers import ParakeetFeatureExtractor

    extractor = ParakeetFeatureExtractor(
        feature_size=config.num_mel_bins,
        hop_length=config.hop_length,
        n_fft=config.n_fft,
        win_length=config.win_length,
        preemphasis=config.preemphasis,
        sampling_rate=config.sampling_rate,
    )
    made = extractor([wave], sampling_rate=config.sampling_rate, return_tensors="np")
    features: NDArray[Any] = made["input_features"][0]
    return features


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("codec", "bits"), [("pcm_u8", 8), ("pcm_s16le", 16), ("pcm_s24le", 24), ("pcm_s32le", 32)]
)
def test_integers_are_divided_by_their_range(codec: str, bits: int, channels: int) -> None:
    file = clip(tones(LENGTH, RATE, channels), RATE, "wav", codec)
    # Python's own reader of WAV files knows the bytes only; the rest is arithmetic.
    with wave_files.open(io.BytesIO(file)) as reader:
        assert reader.getnchannels() == channels and reader.getsampwidth() * 8 == bits
        raw = np.frombuffer(reader.readframes(LENGTH), np.uint8).reshape(-1, bits // 8)
    wide = np.zeros((len(raw), 4), np.uint8)
    wide[:, 4 - bits // 8 :] = raw
    numbers = wide.view("<i4")[:, 0].astype(np.int64)
    if bits == 8:
        numbers = (raw[:, 0].astype(np.int64) - 128) << 24
    expected = (numbers / 2**31).astype(np.float32).reshape(-1, channels)
    np.testing.assert_array_equal(decoded(file), expected.T.mean(axis=0))


@pytest.mark.parametrize(
    ("container", "codec"),
    [("wav", "pcm_f32le"), ("wav", "pcm_f64le"), ("mp3", "libmp3lame"), ("ipod", "aac")],
)
def test_other_formats_are_as_ffmpeg_decodes_them(container: str, codec: str) -> None:
    file = clip(tones(LENGTH, RATE), RATE, container, codec)
    assert INPUT.examine(file) == ClipShape(samples=LENGTH, stored=LENGTH, rate=RATE)
    np.testing.assert_array_equal(decoded(file), wave_of(file).astype(np.float32)[0])


def test_flac_holds_what_was_stored() -> None:
    exact = (tones(LENGTH, RATE, 2) * 2**15).astype(np.int16).astype(np.float32) / 2**15
    for container in ("flac", "ogg"):
        file = clip(exact, RATE, container, "flac")
        np.testing.assert_array_equal(decoded(file), exact.mean(axis=0))


@pytest.mark.parametrize(
    ("container", "codec", "rate", "channels"),
    [
        ("wav", "pcm_s16le", 8_000, 1),
        ("wav", "pcm_f32le", 44_100, 2),
        ("flac", "flac", 48_000, 2),
        ("flac", "flac", 22_050, 1),
    ],
)
def test_other_rates_are_resampled(container: str, codec: str, rate: int, channels: int) -> None:
    wave = tones(rate // 2 + 77, rate, channels)
    made = decoded(clip(wave, rate, container, codec))
    assert len(made) == -(-wave.shape[1] * RATE // rate)
    # The same tones at the other rate, without any filter.
    expected = tones(len(made), RATE, channels).mean(axis=0)
    # Beyond the ends a filter sees what it takes for the tone.
    inside = slice(100, -100)
    assert np.abs(made - expected)[inside].max() < 0.002
    # A shift of one sample would be seen.
    assert np.abs(made[1:] - expected[:-1])[inside].max() > 0.05


@pytest.mark.parametrize(
    ("container", "codec", "rate", "options"),
    [
        ("mp3", "libmp3lame", 44_100, {}),
        ("ogg", "libopus", 48_000, {}),
        ("ogg", "vorbis", 44_100, {"strict": "experimental"}),
        ("ipod", "aac", 44_100, {}),
    ],
)
def test_lengths_are_known_without_decoding(
    container: str, codec: str, rate: int, options: dict[str, str]
) -> None:
    file = clip(tones(rate + 123, rate, 2), rate, container, codec, options)
    shape = INPUT.examine(file)
    stored = wave_of(file)
    assert (shape.stored, shape.rate) == (stored.shape[1], rate)
    item, reason = INPUT.encode(file, shape, with_content=True)
    assert reason is None and item.features is not None
    assert item.features.shape == (INPUT.config.num_frames(shape.samples), 80)
    without, _ = INPUT.encode(file, shape, with_content=False)
    assert (without.samples, without.rows) == (item.samples, item.rows)
    assert pickle.loads(pickle.dumps(item)).rows == item.rows


@pytest.mark.parametrize("length", [320, 321, 479, 480, 16_000, 20_001])
def test_features_are_those_of_transformers(length: int) -> None:
    wave = np.random.default_rng(length).normal(0, 0.1, length).astype(np.float32)
    item, _ = INPUT.encode(wave, INPUT.examine(wave), with_content=True)
    assert item.features is not None
    np.testing.assert_array_equal(item.features, by_transformers(wave, INPUT.config))
    assert not item.features[-1].any() and item.features[:-1].any(axis=1).all()
    # Rows as transformers' processor counts them.
    frames = 1 + length // 160
    for _ in range(3):
        frames = (frames - 1) // 2 + 1
    assert item.rows == frames


def test_features_follow_the_settings() -> None:
    config = AudioConfig(
        sampling_rate=8_000, hop_length=100, n_fft=256, win_length=200, preemphasis=0.5,
        num_mel_bins=24, subsampling_factor=4,
    )  # fmt: skip
    file = clip(tones(8_000, 8_000), 8_000, "wav", "pcm_f32le")
    kind = AudioInput(config=config)
    item, _ = kind.encode(file, kind.examine(file), with_content=True)
    assert item.features is not None and item.features.shape == (81, 24)
    np.testing.assert_array_equal(item.features, by_transformers(tones(8_000, 8_000)[0], config))
    assert item.rows == 21
    for field, value in (("n_fft", 255), ("win_length", 1000)):
        with pytest.raises(ValueError, match=field):
            AudioConfig(**{field: value})  # type: ignore[arg-type]


def test_clips_stand_between_their_tags() -> None:
    item, _ = INPUT.encode(np.zeros(RATE, np.float32), ClipShape(
        samples=RATE, stored=RATE, rate=RATE
    ), with_content=False)  # fmt: skip
    assert INPUT.layout(item) == ("<so_start>", 13, "<so_end>")
    assert (INPUT.placeholder, INPUT.token) == ("<audio>", "<so_embedding>")
    assert INPUT.words.one == "an audio"


def test_a_longer_track_of_pictures_does_not_count() -> None:
    """The sound track of a video is a clip."""
    from tests.unit_tests.media.recorded import pictures, video

    for container in ("mp4", "matroska"):
        file = video(pictures(20, 32, 32), container, sound=tones(24_000, 48_000))
        assert INPUT.examine(file).samples == pytest.approx(RATE / 2, abs=RATE / 50)


def test_mock_clips_fit_and_sound_as_they_are_called() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        made = INPUT.mock(rng, 60)
        (wave,) = made.sources
        item, _ = INPUT.encode(wave, INPUT.examine(wave), with_content=True)
        texts = made.question.removeprefix("<audio>") + made.answer + "".join(INPUT.tags)
        assert item.rows + len(texts) < 60
        peak = np.abs(np.fft.rfft(wave)).argmax() / len(wave)
        name = {"low": 0.02, "middle": 0.06, "high": 0.15, "shrill": 0.3}[made.answer]
        assert peak == pytest.approx(name, abs=0.005)
    INPUT.check_mock(60)
    with pytest.raises(ValueError, match="--seq-length"):
        INPUT.check_mock(50)


def test_a_file_of_a_pipe_has_the_length_of_its_samples() -> None:
    file = clip(tones(LENGTH, RATE), RATE)
    at = file.index(b"data") + 4
    for unknown in (0, 0xFFFFFFFF):
        streamed = file[:at] + struct.pack("<I", unknown) + file[at + 4 :]
        assert INPUT.examine(streamed).samples == LENGTH
        np.testing.assert_array_equal(decoded(streamed), decoded(file))
