"""The data that a loader gives to a training step.

Letters: B sequences of a microbatch, S tokens of a sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from megatron_mimo.bridge.manifest import Documents, Manifest
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
        padding: Where no sample has a token, bool [B, S].
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
    padding: Tensor
    lengths: tuple[int, ...] | None = None
    cu_seqlens: Tensor | None = None
    facts: Mapping[str, Tensor] = field(default_factory=dict)


NetworkRows = tuple[tuple[int, int, int], ...]
"""(dp rank of a source, lane, number of rows that the rank sends to the lane), of some ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """One microbatch, as far as this rank takes part in it.

    Attributes:
        index: Position within the step.
        manifest: Items of all modules of the lanes that this rank reads, and of those of which it
            runs an item in this microbatch, in canonical order.
        keys: Lane -> keys of its samples, of the lanes in the manifest and those read here.
        starts: Lane -> (sequence, position) at which each of these samples begins.
        text: Tokens of this rank's lane, on ranks of the target; None on others.
        inputs: Module -> its packed items that are assigned to this rank, in manifest order; only
            modules with such items.
        documents: Lane -> number of tokens of each document of its packed sequence, and of the
            padding after them, which sum to S; of every lane in the manifest; empty without
            packing.
        network_rows: Source -> rows that its dp ranks send, for sources whose items are balanced
            and for which `BridgePlanner.needs_network_rows` holds: of all ranks that send to this
            rank's lane. Empty where lanes decide who runs an item.
    """

    index: int
    manifest: Manifest
    keys: Mapping[int, tuple[str, ...]]
    text: TextBatch | None
    inputs: Mapping[str, PackedInput]
    starts: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    network_rows: Mapping[str, NetworkRows] = field(default_factory=dict)
    documents: Documents = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleDispatch:
    """How the items of a source were shared out in a step, for one of its data-parallel replicas.

    All ranks of a domain know the costs of all its items, so that no rank asks another for this.

    Attributes:
        by_lane: Operations, forward and backward, of the items that the replica would run in each
            microbatch if lanes decided (`assign_items`).
        as_run: Operations of the items that it runs in each microbatch.
        largest: Operations of the largest item that it runs in each microbatch; 0 without items.
        received: Number of bytes of contents that it got from other ranks.
    """

    by_lane: tuple[int, ...]
    as_run: tuple[int, ...]
    largest: tuple[int, ...]
    received: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDispatch:
    """How the items of a step were shared out, for the replicas of one rank.

    Attributes:
        reader: Global rank that read for this one, whose clock `spans` are of.
        modules: Source -> its items; only sources of this rank whose items are balanced.
        spans: Start and end of each exchange of sizes or contents for the step, in seconds of
            `time.perf_counter`.
    """

    reader: int
    modules: Mapping[str, ModuleDispatch]
    spans: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepData:
    """Everything that this rank needs for one step.

    Attributes:
        microbatches: Microbatches of the step in order.
        lane_digest: Lane -> 63-bit hash of the step's sample keys and of the positions of rows.
        lane_target_tokens: Lane -> number of target tokens of the step.
        lane_positions: Lane -> number of positions of the step that are not padding; empty without
            packing.
        balanced: Whether ranks that read share out the items of sources with domains in this run of
            steps, so that lanes need not tell each other of their rows; equal on every rank.
        dispatch: How items were shared out over the replicas of sources; None where their lanes
            decided.
        prepared: What the model's side has made of the microbatches, ahead of the step
            (`model.inputs.StepInputs`); None until then. It stays on its rank.
    """

    microbatches: tuple[Microbatch, ...]
    lane_digest: dict[int, int]
    lane_target_tokens: dict[int, int]
    lane_positions: dict[int, int] = field(default_factory=dict)
    balanced: bool = False
    dispatch: StepDispatch | None = None
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


class ReadingLoader(ResumableLoader, Protocol):
    """A resumable source whose ranks may decide on a step together."""

    def fail(self, error: Exception) -> None:
        """Tell other ranks that this one cannot go on, unless they know."""
        ...

    def end(self) -> None:
        """Tell other ranks that this one takes no further step."""
        ...
