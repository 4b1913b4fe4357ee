"""What a loader hands to a training step.

Letters: B samples, S tokens of a sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from megatron_mimo.bridge.manifest import Manifest
from megatron_mimo.images import PackedImages


@dataclass(frozen=True, kw_only=True, slots=True)
class TextBatch:
    """Tokens of one lane's microbatch.

    Attributes:
        sample_keys: Keys of the samples: of the B sequences, or of the documents of a packed one.
        input_ids: int64 [B, S]; image tokens stand where rows go.
        labels: int64 [B, S], already shifted: `labels[:, i]` is the target of position `i`.
        loss_mask: float32 [B, S], 1 where the target is part of an answer.
        position_ids: int64 [B, S]; they begin anew with each document.
        lengths: Tokens of each document of the packed sequence, and of the padding behind them, if
            any; they sum to S, and B is 1. None without packing.
        cu_seqlens: int32 [N+1], the lengths cumulated; None without packing.
    """

    sample_keys: tuple[str, ...]
    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...] | None = None
    cu_seqlens: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """One microbatch, as far as this rank takes part in it.

    Attributes:
        index: Position within the step.
        manifest: Images of the lanes that this rank reads, in canonical order.
        keys: Lane -> keys of its samples, of the lanes that this rank reads.
        starts: Lane -> where each of these samples begins: (sequence, position).
        text: Tokens, on ranks of the language model.
        images: Patches, on ranks of the encoder; None when no image is assigned to this one.
    """

    index: int
    manifest: Manifest
    keys: Mapping[int, tuple[str, ...]]
    text: TextBatch | None
    images: PackedImages | None
    starts: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepData:
    """Everything that this rank needs for one step.

    Attributes:
        microbatches: In order.
        lane_digest: Lane -> 63-bit hash of the step's sample keys and of where rows go.
        lane_target_tokens: Lane -> target tokens of the step.
        lane_positions: Lane -> positions of the step that are no padding; empty without packing.
    """

    microbatches: tuple[Microbatch, ...]
    lane_digest: dict[int, int]
    lane_target_tokens: dict[int, int]
    lane_positions: dict[int, int] = field(default_factory=dict)


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
