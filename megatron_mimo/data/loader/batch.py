"""The data that a loader gives to a training step.

Letters: B sequences of a microbatch, S tokens of a sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from megatron_mimo.bridge.manifest import Manifest
from megatron_mimo.data.inputs import PackedInput


@dataclass(frozen=True, kw_only=True, slots=True)
class TextBatch:
    """Tokens of one lane's microbatch.

    Attributes:
        sample_keys: Keys of the samples: of the B sequences, or of the documents of a packed one.
        input_ids: Tokens, int64 [B, S], with each module's token at the positions of its rows.
        labels: Targets, int64 [B, S], already shifted: `labels[:, i]` is that of position `i`.
        loss_mask: Weights of the targets, float32 [B, S]: 1 for a part of an answer, else 0.
        position_ids: Positions, int64 [B, S], counted from 0 in each document.
        lengths: Number of tokens of each document of the packed sequence, and of the padding after
            them, if any; they sum to S, and B is 1. None without packing.
        cu_seqlens: Cumulative sums of the lengths, from 0, int32 [N+1]; None without packing.
        facts: Integers of the items beside their rows, by name, int64 [N, ...]: of each item of the
            microbatch, in the order of sequences and positions; only names that an item has.
    """

    sample_keys: tuple[str, ...]
    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...] | None = None
    cu_seqlens: Tensor | None = None
    facts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """One microbatch, as far as this rank takes part in it.

    Attributes:
        index: Position within the step.
        manifest: Items of all modules of the lanes that this rank reads, in canonical order.
        keys: Lane -> keys of its samples, of the lanes that this rank reads.
        starts: Lane -> (sequence, position) at which each of these samples begins.
        text: Tokens of this rank's lane, on ranks of the target; None on others.
        inputs: Module -> its packed items that are assigned to this rank, in manifest order; only
            modules with such items.
    """

    index: int
    manifest: Manifest
    keys: Mapping[int, tuple[str, ...]]
    text: TextBatch | None
    inputs: Mapping[str, PackedInput]
    starts: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepData:
    """Everything that this rank needs for one step.

    Attributes:
        microbatches: Microbatches of the step in order.
        lane_digest: Lane -> 63-bit hash of the step's sample keys and of the positions of rows.
        lane_target_tokens: Lane -> number of target tokens of the step.
        lane_positions: Lane -> number of positions of the step that are not padding; empty without
            packing.
        prepared: What the model's side has made of the microbatches, ahead of the step
            (`model.inputs.StepInputs`); None until then. It stays on its rank.
    """

    microbatches: tuple[Microbatch, ...]
    lane_digest: dict[int, int]
    lane_target_tokens: dict[int, int]
    lane_positions: dict[int, int] = field(default_factory=dict)
    prepared: Any = None


class StepLoader(Protocol):
    """An endless source of steps."""

    def next_step(self) -> StepData:
        """Draw the next global batch's share of this rank."""
        ...


class ResumableLoader(StepLoader, Protocol):
    """A source that can be stopped and continued."""

    def state(self) -> dict[int, Any]:
        """State for `restore`, by lane, for every lane that this rank reads."""
        ...

    def restore(self, lanes: Mapping[int, Any]) -> None:
        """Continue from where `state` was taken, given the states of all lanes."""
        ...
