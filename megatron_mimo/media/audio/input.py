"""Audio clips as the items of a module: the implementation of `data.inputs.ItemInput`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_mimo.media.audio.clip import EncodedClip
from megatron_mimo.media.audio.config import AudioConfig
from megatron_mimo.media.audio.decode import (
    AudioSource,
    ClipShape,
    decode_or_silence,
    examine_clip,
)
from megatron_mimo.media.audio.endings import AUDIO_ENDINGS
from megatron_mimo.media.audio.features import mel_features
from megatron_mimo.media.audio.mock import check_mock_tones, mock_tones
from megatron_mimo.media.audio.packing import PackedClips, pack_clips
from megatron_mimo.media.items import ItemWords, MockItems, OneRunItems


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioInput(OneRunItems):
    """The items of a module that takes audio clips.

    Attributes:
        config: Conversion of a clip to mel features and rows.
        placeholder: Placeholder of a clip in stored samples and questions.
        token: Token of the vocabulary that the rows of a clip replace.
        tags: Texts before and after a clip, each one token of the vocabulary, or empty.
        noun: Name of one clip in messages, and of its field in stored samples.
    """

    config: AudioConfig = field(default_factory=AudioConfig)
    placeholder: str = "<audio>"
    token: str = "<so_embedding>"
    tags: tuple[str, str] = ("<so_start>", "<so_end>")
    noun: str = "audio"

    @property
    def words(self) -> ItemWords:
        """Names of clips in messages and stored samples."""
        return ItemWords(
            noun=self.noun,
            article="an" if self.noun[0] in "aeiou" else "a",
            smaller="cut its clips into shorter ones",
        )

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of audio files in stored samples, in lower case."""
        return AUDIO_ENDINGS

    @property
    def item_type(self) -> type[EncodedClip]:
        """Type of the result of `encode`."""
        return EncodedClip

    @property
    def packed_type(self) -> type[PackedClips]:
        """Type of the result of `pack`."""
        return PackedClips

    def examine(self, source: AudioSource) -> ClipShape:
        """Length of a clip that appears complete, from the header and the packets of its file.

        Raises:
            BrokenItemError: The file is damaged, truncated or empty, has no audio track, or is
                shorter than the features need.
        """
        return examine_clip(source, self.config)

    def encode(
        self, source: AudioSource, shape: ClipShape, *, with_content: bool
    ) -> tuple[EncodedClip, str | None]:
        """Compute the mel features of a clip.

        Args:
            source: Contents of an audio file, or a wave form, float32 [n] at the settings' rate.
            shape: Length of the clip, from `examine`.
            with_content: Whether to compute features; otherwise nothing is decoded.

        Returns:
            The clip, and the reason if silence of its length replaces it.
        """
        rows = self.config.num_rows(self.config.num_frames(shape.samples))
        if not with_content:
            return EncodedClip(samples=shape.samples, rows=rows, features=None), None
        wave, reason = decode_or_silence(source, shape, self.config)
        features = mel_features(wave, self.config)
        return EncodedClip(samples=shape.samples, rows=rows, features=features), reason

    def pack(self, items: Sequence[EncodedClip], seeds: Sequence[int]) -> PackedClips | None:
        """Pack clips one after the other; None for no clip.

        Args:
            items: Clips with features, in manifest order.
            seeds: Seed of each clip; not used, since there is no augmentation.
        """
        return pack_clips(items, self.config)

    def without_augmentation(self) -> "AudioInput":
        """The same settings: there is no augmentation."""
        return self

    def mock(self, rng: np.random.Generator, room: int) -> MockItems:
        """A noisy tone, and the question how high it is.

        Args:
            rng: Random generator of all choices.
            room: Number of positions that the clip, its tags and the texts may take.
        """
        wave, name = mock_tones(rng, room - self._mock_texts, self.config)
        return MockItems(sources=(wave,), question=f"{self.placeholder}Tone?", answer=name)

    def check_mock(self, room: int) -> None:
        """Refuse a sequence without room for the shortest mock clip and its texts.

        Raises:
            ValueError: There is no room.
        """
        check_mock_tones(room - self._mock_texts, self._mock_texts, self.config)

    @property
    def _mock_texts(self) -> int:
        """Most positions of the texts of a mock sample, in bytes."""
        return len("".join(self.tags)) + MOCK_TEXTS


MOCK_TEXTS = 34
"""Number of bytes of the longest texts around a mock clip, end of sequence included."""
