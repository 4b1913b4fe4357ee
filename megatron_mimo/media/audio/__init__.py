"""Audio clips: from a file to mel features, and packed for an encoder."""

from megatron_mimo.media.audio.clip import EncodedClip
from megatron_mimo.media.audio.config import AudioConfig
from megatron_mimo.media.audio.decode import (
    AudioSource,
    BrokenClipError,
    ClipShape,
    decode_clip,
    examine_clip,
)
from megatron_mimo.media.audio.endings import AUDIO_ENDINGS
from megatron_mimo.media.audio.features import mel_features
from megatron_mimo.media.audio.input import AudioInput
from megatron_mimo.media.audio.packing import PackedClips, pack_clips

__all__ = [
    "AUDIO_ENDINGS",
    "AudioConfig",
    "AudioInput",
    "AudioSource",
    "BrokenClipError",
    "ClipShape",
    "EncodedClip",
    "PackedClips",
    "decode_clip",
    "examine_clip",
    "mel_features",
    "pack_clips",
]
