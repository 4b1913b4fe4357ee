"""What a loader hands to a training step.

Letters: B samples, S tokens of a sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megatron_mimo.bridge.manifest import Manifest
from megatron_mimo.images import PackedImages


@dataclass(frozen=True, kw_only=True, slots=True)
class TextBatch:
    """Tokens of one lane's microbatch.

    Attributes:
        sample_keys: Keys of the B samples, one for each sequence.
        input_ids: int64 [B, S]; image tokens stand where rows go.
        labels: int64 [B, S], already shifted: `labels[:, i]` is the target of position `i`.
        loss_mask: float32 [B, S], 1 where the target is part of an answer.
        position_ids: int64 [B, S].
    """

    sample_keys: tuple[str, ...]
    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """One microbatch, as far as this rank takes part in it.

    Attributes:
        index: Position within the step.
        manifest: Images of the lanes that this rank reads, in canonical order.
        keys: Lane -> keys of its samples, one for each sequence, of the lanes that this rank reads.
        text: Tokens, on ranks of the language model.
        images: Patches, on ranks of the encoder; None when no image is assigned to this one.
    """

    index: int
    manifest: Manifest
    keys: Mapping[int, tuple[str, ...]]
    text: TextBatch | None
    images: PackedImages | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepData:
    """Everything that this rank needs for one step.

    Attributes:
        microbatches: In order.
        lane_digest: Lane -> 63-bit hash of the step's sample keys and of where rows go.
        lane_target_tokens: Lane -> target tokens of the step.
    """

    microbatches: tuple[Microbatch, ...]
    lane_digest: dict[int, int]
    lane_target_tokens: dict[int, int]


class StepLoader(Protocol):
    """An endless source of steps."""

    def next_step(self) -> StepData:
        """Draw the next global batch's share of this rank."""
        ...


class ResumableLoader(StepLoader, Protocol):
    """A source that can be stopped and gone on with."""

    def state(self) -> dict[int, Any]:
        """What `restore` needs, by lane; of every lane that this rank reads."""
        ...

    def restore(self, lanes: Mapping[int, Any]) -> None:
        """Go on where `state` was taken, given the states of all lanes."""
        ...
