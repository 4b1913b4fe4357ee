"""Settings of the data, and the part of it that a rank needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_mimo.images import ImageConfig

PromptFormat = Literal["plain", "chat", "nemotron6-moe"]
ImageTagType = Literal["internvl"]


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
        num_workers: Workers per lane, each with a share of the dataset in an order of its own; 0 is
            one, which reads in the training process.
        loader_processes: Processes per rank that do the work of its lanes' workers, 0 for none;
            None is as many as there are cores, less one. Says nothing about the order of samples.
        slow_reader_s: Seconds without a sample after which a warning names the process.
        stuck_reader_s: Seconds after which that stops the run.
        shuffle_buffer_size: Samples among which the next training sample is drawn.
        packing_buffer_size: Samples among which those that share a sequence are chosen; None gives
            each a sequence of its own.
        max_samples_per_sequence: Samples read from a shard in a row before jumping elsewhere.
        max_skips_in_row: Bad samples in a row that stop the run.
        max_bad_sample_fraction: Part of a lane's samples that may be bad, 0 to 1; more stop the
            run.
        image: How an image becomes patches.
        text_only_fraction: Part of mock samples that have no image, 0 to 1.
        mock_dataset_size: Distinct mock samples; then they repeat.
        mock_image_rows: Rows of every mock image; None for images of any size.
        image_token: Placeholder of an image in texts, and the token at which its rows go.
        prompt_format: How a conversation is written out; None is the tokenizer's own template where
            it has one, and plain otherwise.
        image_tag_type: "internvl" writes <img> and </img> around each image; None nothing.
        sample_trace_dir: Folder for traces of sample keys, or None.
    """

    provider: Literal["mock", "energon"] = "mock"
    path: str | None = None
    seed: int = 1234
    seq_length: int = 64
    micro_batch_size: int = 1
    global_batch_size: int = 1
    num_workers: int = 0
    loader_processes: int | None = None
    slow_reader_s: float = 60.0
    stuck_reader_s: float = 600.0
    shuffle_buffer_size: int = 100
    packing_buffer_size: int | None = None
    max_samples_per_sequence: int = 100
    max_skips_in_row: int = 100
    max_bad_sample_fraction: float = 0.05
    image: ImageConfig = field(default_factory=ImageConfig)
    text_only_fraction: float = 0.0
    mock_dataset_size: int = 1_000_000
    mock_image_rows: int | None = None
    image_token: str = "<image>"
    prompt_format: PromptFormat | None = None
    image_tag_type: ImageTagType | None = None
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
            "--loader-processes": (self.loader_processes or 0, 0),
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
        if not 0 <= self.max_bad_sample_fraction <= 1:
            raise ValueError(
                f"--max-bad-sample-fraction is {self.max_bad_sample_fraction}: expected 0 to 1"
            )
        self._check_packing()
        if not self.image_token:
            raise ValueError("--image-token is empty: expected a placeholder such as <image>")

    def _check_packing(self) -> None:
        if self.packing_buffer_size is None:
            return
        if self.packing_buffer_size < 1:
            raise ValueError(
                f"--packing-buffer-size is {self.packing_buffer_size}: expected at least 1"
            )
        if self.provider != "energon":
            raise ValueError(
                f"--packing-buffer-size {self.packing_buffer_size} with --dataset-provider "
                f"{self.provider}, whose samples have a sequence each: leave it out, or use energon"
            )
        if self.micro_batch_size > 1:
            raise ValueError(
                f"--micro-batch-size {self.micro_batch_size} with --packing-buffer-size "
                f"{self.packing_buffer_size}: a packed sequence is a batch by itself; set "
                f"--micro-batch-size 1 and raise --seq-length"
            )

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
