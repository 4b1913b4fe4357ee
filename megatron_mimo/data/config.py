"""Settings of the data, and the part of it that a rank needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_mimo.images import ImageConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where samples come from and how many make a batch.

    Attributes:
        provider: "mock" makes samples up; "energon" reads a dataset from disk.
        path: Energon dataset folder or metadataset file.
        seed: Of mock samples and of shuffling.
        seq_length: S, tokens of a sequence.
        micro_batch_size: Samples per lane and forward.
        global_batch_size: Samples per step, over all lanes.
        num_workers: Reader processes per lane; 0 reads in the training process.
        shuffle_buffer_size: Samples among which the next training sample is drawn.
        max_samples_per_sequence: Samples read from a shard in a row before jumping elsewhere.
        max_skips_in_row: Unreadable samples in a row that stop the run.
        image: How an image becomes patches.
        text_only_fraction: Part of mock samples that have no image, 0 to 1.
        mock_dataset_size: Distinct mock samples; then they repeat.
        image_token: Placeholder of an image in texts, and the token at which its rows go.
        sample_trace_dir: Folder for traces of sample keys, or None.
    """

    provider: Literal["mock", "energon"] = "mock"
    path: str | None = None
    seed: int = 1234
    seq_length: int = 64
    micro_batch_size: int = 1
    global_batch_size: int = 1
    num_workers: int = 0
    shuffle_buffer_size: int = 100
    max_samples_per_sequence: int = 100
    max_skips_in_row: int = 100
    image: ImageConfig = field(default_factory=ImageConfig)
    text_only_fraction: float = 0.0
    mock_dataset_size: int = 1_000_000
    image_token: str = "<image>"
    sample_trace_dir: str | None = None

    def __post_init__(self) -> None:
        if self.provider not in ("mock", "energon"):
            raise ValueError(f"--dataset-provider {self.provider}: expected 'mock' or 'energon'")
        if self.provider == "energon" and not self.path:
            raise ValueError(
                "--dataset-provider energon needs --data-path, the dataset's folder; "
                "`megatron-mimo data digits --out DIR` writes one to try"
            )
        least = {
            "--seq-length": (self.seq_length, 2),
            "--micro-batch-size": (self.micro_batch_size, 1),
            "--global-batch-size": (self.global_batch_size, 1),
            "--num-workers": (self.num_workers, 0),
            "--shuffle-buffer-size": (self.shuffle_buffer_size, 0),
            "--max-samples-per-sequence": (self.max_samples_per_sequence, 1),
            "max_skips_in_row": (self.max_skips_in_row, 1),
            "--mock-dataset-size": (self.mock_dataset_size, 1),
            "--seed": (self.seed, 0),
        }
        for flag, (value, lowest) in least.items():
            if value < lowest:
                raise ValueError(f"{flag} is {value}: expected at least {lowest}")
        if not 0 <= self.text_only_fraction <= 1:
            raise ValueError(f"--text-only-fraction is {self.text_only_fraction}: expected 0 to 1")
        if not self.image_token:
            raise ValueError("--image-token is empty: expected a placeholder such as <image>")

    def num_microbatches(self, num_lanes: int) -> int:
        """Microbatches of a step on each lane.

        Raises:
            ValueError: The global batch does not divide over the lanes' microbatches.
        """
        per_round = self.micro_batch_size * num_lanes
        if self.global_batch_size % per_round:
            nearest = max(1, round(self.global_batch_size / per_round)) * per_round
            raise ValueError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of "
                f"--micro-batch-size {self.micro_batch_size} x --llm-dp {num_lanes}: "
                f"set --global-batch-size {nearest}, or change one of the others"
            )
        return self.global_batch_size // per_round


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRole:
    """Which part of a step a rank needs.

    Attributes:
        lanes: Lanes that it reads, ascending.
        num_lanes: Lanes in all.
        text_lane: Lane whose tokens it needs, on ranks of the language model.
        encoder_rank: Encoder dp rank whose images it needs, on ranks of the encoder.
        serving: Lane -> encoder dp ranks that serve it; empty without an encoder.
    """

    lanes: tuple[int, ...]
    num_lanes: int
    text_lane: int | None
    encoder_rank: int | None
    serving: Mapping[int, tuple[int, ...]]
