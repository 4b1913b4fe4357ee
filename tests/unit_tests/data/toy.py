"""Tones: a second kind of items, as a module from outside of the package would bring."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mimo.data import BrokenItemError, ItemWords, MockItems, OneRunItems

_HEAD = struct.Struct("<4sBB")
_SAMPLES_PER_ROW = 3
PITCHES = ("low", "mid", "high")


def tone(rows: int, pitch: int = 0, *, lost: int = 0) -> bytes:
    """A file of a tone; some of its last samples may be lost."""
    body = np.full(rows * _SAMPLES_PER_ROW - lost, pitch, np.int16)
    return _HEAD.pack(b"TONE", rows, pitch) + body.tobytes()


@dataclass(frozen=True, slots=True)
class Tone:
    """An encoded tone.

    Attributes:
        rows: Number of rows that it becomes.
        wave: int16 [3 * rows]; None where it is not needed.
    """

    rows: int
    wave: NDArray[np.int16] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTones:
    """Tones end to end.

    Attributes:
        waves: int16 [T].
        lengths: Samples of each.
        names: Name of the pitch of each.
        seeds: Seed of each, and whether it is used.
        gain: By how much they are louder.
    """

    waves: Tensor
    lengths: tuple[int, ...]
    names: tuple[str, ...]
    seeds: tuple[tuple[int, bool], ...]
    gain: float

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)


@dataclass(frozen=True, kw_only=True, slots=True)
class ToneInput(OneRunItems):
    """Tones as the items of a module.

    Attributes:
        placeholder: Stands for a tone.
        tags: Around a tone.
        gain: By how much tones are louder; a random change, for the tests.
        mock_share: Part of mock samples that have a tone.
    """

    placeholder: str = "<tone>"
    tags: tuple[str, str] = ("", "")
    gain: float = 1.0
    mock_share: float = 0.7

    @property
    def words(self) -> ItemWords:
        return ItemWords(noun="tone", placeholder="--tone-token", smaller="play shorter tones")

    @property
    def endings(self) -> tuple[str, ...]:
        return ("tone", "wav")

    @property
    def item_type(self) -> type[Tone]:
        return Tone

    @property
    def packed_type(self) -> type[PackedTones]:
        return PackedTones

    def examine(self, source: bytes) -> tuple[int, int]:
        """Rows and pitch."""
        if len(source) < _HEAD.size or source[:4] != b"TONE":
            raise BrokenItemError(f"tone of {len(source)} bytes has no header")
        _, rows, pitch = _HEAD.unpack_from(source)
        return rows, pitch

    def encode(
        self, source: bytes, shape: tuple[int, int], *, with_content: bool
    ) -> tuple[Tone, str | None]:
        rows = shape[0]
        if not with_content:
            return Tone(rows, None), None
        wave = np.frombuffer(source[_HEAD.size :], np.int16)
        if len(wave) != rows * _SAMPLES_PER_ROW:
            return Tone(rows, np.zeros(rows * _SAMPLES_PER_ROW, np.int16)), "silence stands in"
        return Tone(rows, wave), None

    def lengths(self, item: Tone) -> tuple[int, ...]:
        return (item.rows * _SAMPLES_PER_ROW,)

    def pack(self, items: Sequence[Tone], seeds: Sequence[int]) -> PackedTones | None:
        waves = [item.wave for item in items if item.wave is not None]
        assert len(waves) == len(items), "tones were encoded without content"
        if not waves:
            return None
        return PackedTones(
            waves=torch.from_numpy(np.concatenate(waves)),
            lengths=tuple(len(wave) for wave in waves),
            names=tuple(PITCHES[int(wave[0])] for wave in waves),
            seeds=tuple((seed, True) for seed in seeds),
            gain=self.gain,
        )

    def without_augmentation(self) -> "ToneInput":
        return replace(self, gain=1.0)

    def mock(self, rng: np.random.Generator, room: int) -> MockItems | None:
        if rng.random() >= self.mock_share:
            return None
        pitch = int(rng.integers(len(PITCHES)))
        rows = int(rng.integers(1, 4))
        assert rows + 20 <= room, room
        return MockItems(
            sources=(tone(rows, pitch),),
            question=f"{self.placeholder}Pitch?",
            answer=PITCHES[pitch],
        )

    def check_mock(self, room: int) -> None:
        if room < 23:
            raise ValueError(f"tones need 23 positions, and have {room}")
