"""How a clip becomes mel features and rows."""

from dataclasses import dataclass
from typing import Annotated

from megatron_mimo.settings import Within, check_fields
from megatron_mimo.settings.ranges import MOST_WIDTH


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioConfig:
    """How a clip becomes mel features and rows; the defaults are those of transformers' Parakeet.

    Attributes:
        sampling_rate: Samples a second that a clip is resampled to.
        hop_length: Number of samples between two mel frames.
        n_fft: Number of samples of a Fourier transform.
        win_length: Number of samples of its window.
        preemphasis: Coefficient of the filter before the transform; 0 for none.
        num_mel_bins: Number of mel features of a frame.
        subsampling_factor: Number of mel frames that become one row: a power of two.
        conv_kernel_size: Number of rows that a convolution of the encoder's layers covers, odd;
            clips are packed so far apart that none covers two.
    """

    sampling_rate: Annotated[int, Within(1000, 400_000)] = 16_000
    hop_length: Annotated[int, Within(1, 100_000)] = 160
    n_fft: Annotated[int, Within(2, 100_000)] = 512
    win_length: Annotated[int, Within(2, 100_000)] = 400
    preemphasis: Annotated[float, Within(0, 1)] = 0.97
    num_mel_bins: Annotated[int, Within(1, MOST_WIDTH)] = 80
    subsampling_factor: Annotated[int, Within(2, 64)] = 8
    conv_kernel_size: Annotated[int, Within(1, 1001)] = 9

    def __post_init__(self) -> None:
        check_fields(self)
        if self.subsampling_factor & (self.subsampling_factor - 1):
            raise ValueError(
                f"subsampling_factor is {self.subsampling_factor}: expected a power of two"
            )
        if self.n_fft % 2:
            raise ValueError(f"n_fft is {self.n_fft}: expected an even number of samples")
        if self.win_length > self.n_fft:
            raise ValueError(
                f"win_length is {self.win_length}: expected at most n_fft, {self.n_fft} samples"
            )
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size is {self.conv_kernel_size}: expected an odd number")

    @property
    def least_samples(self) -> int:
        """Smallest number of samples of a clip: variances need two mel frames."""
        return 2 * self.hop_length

    def num_frames(self, samples: int) -> int:
        """Number of mel frames of a clip; the last one is zero, as transformers masks it."""
        return 1 + samples // self.hop_length

    def num_rows(self, frames: int) -> int:
        """Number of rows that so many mel frames become, each stride rounding up."""
        for _ in range(self.subsampling_factor.bit_length() - 1):
            frames = (frames + 1) // 2
        return frames
