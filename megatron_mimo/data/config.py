"""Settings of the data of a run."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from megatron_mimo.data.inputs import ENCODER, Inputs, hosts
from megatron_mimo.data.source import SourceConfig
from megatron_mimo.media.images import ImageInput
from megatron_mimo.settings import Within, check_bounds
from megatron_mimo.settings.ranges import (
    MOST_BATCH,
    MOST_POSITIONS,
    MOST_SAMPLES,
    MOST_SEED,
)

PromptFormat = Literal["plain", "chat", "nemotron6-moe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(SourceConfig):
    """Sources of samples, conversion of a sample to a sequence, and sizes of batches.

    Attributes:
        seed: Seed of mock samples and of shuffling.
        seq_length: Number of tokens of a sequence, S.
        micro_batch_size: Number of samples per lane and forward.
        global_batch_size: Number of samples per step, over all lanes.
        slow_reader_s: Seconds without a sample after which a warning names the process.
        stuck_reader_s: Seconds without a sample after which the run stops.
        max_skips_in_row: Number of bad samples in a row that stop the run.
        inputs: Kinds of items by name; token ids are given in this order.
        prompt_format: Format in which a conversation is written; None for the tokenizer's own
            template where it has one, and plain otherwise.
    """

    seed: Annotated[int, Within(0, MOST_SEED)] = 1234
    seq_length: Annotated[int, Within(2, MOST_POSITIONS)] = 64
    micro_batch_size: Annotated[int, Within(1, MOST_BATCH)] = 1
    global_batch_size: Annotated[int, Within(1, MOST_BATCH)] = 1
    slow_reader_s: Annotated[float, Within(0, 1e6)] = 60.0
    stuck_reader_s: Annotated[float, Within(0, 1e6)] = 600.0
    max_skips_in_row: Annotated[int, Within(1, MOST_SAMPLES)] = 100
    inputs: Inputs = field(default_factory=lambda: {ENCODER: ImageInput()})
    prompt_format: PromptFormat | None = None

    def __post_init__(self) -> None:
        if self.provider not in ("mock", "energon"):
            raise ValueError(f"--dataset-provider {self.provider}: expected 'mock' or 'energon'")
        if self.provider == "energon" and not self.path:
            raise ValueError(
                "--dataset-provider energon needs --data-path, the dataset's folder; "
                "`megatron-mimo data digits --out DIR` writes one to try"
            )
        check_bounds(self)
        self._check_packing()
        self._check_inputs()

    def _check_inputs(self) -> None:
        kinds = list(self.inputs.items())
        for number, (module, kind) in enumerate(kinds):
            flag = f"{kind.words.placeholder} of module {module}"
            if not kind.placeholder:
                raise ValueError(
                    f"{kind.words.placeholder} is empty: expected a placeholder such as <image>"
                )
            for other, another in kinds[:number]:
                if kind.placeholder in another.placeholder or (
                    another.placeholder in kind.placeholder
                ):
                    raise ValueError(
                        f"{flag} is {kind.placeholder!r}, and that of {other} "
                        f"{another.placeholder!r}: expected two that cannot be taken for each "
                        f"other; change one of them"
                    )
                if kind.words.noun == another.words.noun:
                    raise ValueError(
                        f"modules {other} and {module} both call an item {kind.words.noun!r}: "
                        f"expected a noun for each, by which stored samples tell them apart"
                    )

    def _check_packing(self) -> None:
        if self.packing_buffer_size is None:
            return
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

    @property
    def hosts(self) -> Inputs:
        """The kind of items of each module's own name."""
        return hosts(self.inputs)

    def num_microbatches(self, num_lanes: int) -> int:
        """Number of microbatches of a step on each lane.

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

    def without_augmentation(self) -> "DataConfig":
        """The same settings without augmentation of items, as evaluation reads."""
        inputs = {module: kind.without_augmentation() for module, kind in self.inputs.items()}
        return replace(self, inputs=inputs)
