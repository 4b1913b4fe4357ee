"""What the stages of a rank read of a step's data, computed on the host and ahead of the step.

A microbatch has whole sequences and all that is known of its samples. A stage reads a part of it:
the positions of its context-parallel rank, tokens on the first stage, targets on the last. All of
it is cut out, and where rows belong is found, while the step before runs; then it is copied to the
device as it is (`runtime.staging`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from megatron_mimo.data.inputs import PackedInput
from megatron_mimo.data.loader.batch import Microbatch, StepData, TextBatch
from megatron_mimo.kernels.cut import DocumentCut
from megatron_mimo.kernels.packed import PackedSegments, packed_documents
from megatron_mimo.model.mimo import MimoModel
from megatron_mimo.modules.families import language_adapter, source_adapter
from megatron_mimo.modules.language.merge import positions_in, row_positions
from megatron_mimo.runtime.staging import CopiedAhead, Staging


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetInputs:
    """What a stage of the language model reads of a microbatch; S is its cp rank's part.

    Attributes:
        batch: Number of sequences, B.
        input_ids: Tokens, int64 [B, S]; None after the first stage, unless every stage reads them
            (`LanguageAdapter.tokens_on_every_stage`).
        position_ids: Positions in each document, int64 [B, S], where there are tokens.
        row_positions: Source -> positions of its rows in this rank's shard, int64 [R]; empty after
            the first stage.
        labels: Target of each position, int64 [B, S]; None before the last stage.
        loss_mask: Weights of the targets, float32 [B, S]; None before the last stage.
        documents: Boundaries of the documents of a packed sequence; None without packing.
        padding: Which positions of this rank's shard have no token, bool [B, s]; None where no
            layer asks (`LanguageAdapter.reads_padding`).
        facts: Name -> integers of every item, int64 [N, ...]; None where no stage but the first
            reads tokens.
    """

    batch: int
    input_ids: Tensor | None = None
    position_ids: Tensor | None = None
    row_positions: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    documents: PackedSegments | None = None
    padding: Tensor | None = None
    facts: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """What the stages of a rank read in a step, on the host, from `InputReader`.

    Attributes:
        sources: Source -> its packed items in each microbatch, of which a cp rank has its part;
            None where it has none.
        target: Inputs of the language model in each microbatch; empty on ranks without it.
        staging: What copies them to the device.
    """

    sources: Mapping[str, tuple[PackedInput | None, ...]]
    target: tuple[TargetInputs, ...]
    staging: Staging

    def copy_sources(self) -> dict[str, CopiedAhead[PackedInput]]:
        """Begin to copy the inputs of every source: source -> inputs by microbatch."""
        return {name: self.staging.ahead(packed) for name, packed in self.sources.items()}

    def copy_target(self) -> CopiedAhead[TargetInputs]:
        """Begin to copy the inputs of the language model."""
        return self.staging.ahead(self.target)


class InputReader:
    """Prepares the inputs of this rank's stages; any thread may call it.

    Args:
        model: The modules of this rank.
        placeholder_ids: Source name -> number of the token that its rows replace.
        seq_length: Number of positions of a sequence that is not packed, S; None for the model's
            own sequences.

    Attributes:
        tokens_on_every_stage: Whether every stage of this rank's language model reads tokens and
            what is known of items.
    """

    def __init__(
        self,
        model: MimoModel,
        placeholder_ids: Mapping[str, int],
        *,
        seq_length: int | None = None,
    ) -> None:
        self._model = model
        self._staging = Staging(model.device)
        self._sources = tuple(name for name in model.modules if name != model.target_name)
        self._placeholder_ids = placeholder_ids
        self._groups = None if model.target is None else model.target.groups
        self.tokens_on_every_stage = self._reads_padding = False
        if self._groups is not None:
            assert model.target is not None
            adapter = language_adapter(model.target.config)
            self.tokens_on_every_stage = adapter.tokens_on_every_stage
            self._reads_padding = adapter.reads_padding(model.target.config)
            self._sharding = model.sharding
            if seq_length is not None:
                self._sharding = replace(model.sharding, seq_length=seq_length, packed=False)

    def at_length(self, seq_length: int) -> "InputReader":
        """A reader of sequences of another length that are not packed, for evaluation.

        Args:
            seq_length: Number of positions of a sequence, S.

        Raises:
            ValueError: The ranks of a lane cannot share so many evenly.
        """
        return InputReader(self._model, self._placeholder_ids, seq_length=seq_length)

    def of(self, data: StepData) -> StepInputs:
        """The inputs of a step: those that were prepared ahead, or else new ones."""
        if data.prepared is None:
            return self.prepare(data.microbatches)
        assert isinstance(data.prepared, StepInputs), type(data.prepared).__name__
        return data.prepared

    def prepare(self, microbatches: Sequence[Microbatch]) -> StepInputs:
        """Inputs of microbatches, in page-locked memory where the device is a GPU."""
        sources = {
            name: tuple(self._source_input(name, each.inputs.get(name)) for each in microbatches)
            for name in self._sources
        }
        target: tuple[TargetInputs, ...] = ()
        if self._groups is not None:
            target = tuple(self._target_inputs(microbatch.text) for microbatch in microbatches)
        inputs = StepInputs(sources=sources, target=target, staging=self._staging)
        return self._staging.pin(inputs)

    def row_positions(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Source -> positions of its rows in the shard that this rank embeds, int64 [R].

        Args:
            input_ids: Tokens of whole sequences that are not packed, int64 [B, S], on the host.
        """
        return self._row_positions(input_ids, self._whole)

    def _row_positions(self, input_ids: Tensor, held: "_Held") -> dict[str, Tensor]:
        return {
            source: row_positions(input_ids, token_id, held.embedded)
            for source, token_id in self._placeholder_ids.items()
        }

    @cached_property
    def _whole(self) -> "_Held":
        """Positions of this rank in a sequence that is not packed."""
        return self._held(())

    def _held(self, documents: tuple[int, ...]) -> "_Held":
        """Positions of this rank in a sequence of some documents; of none if it is not packed."""
        assert self._groups is not None
        place = self._groups.place
        cut = self._sharding.of(documents)
        shard = self._sharding.shard(cp_rank=place.cp, tp_rank=place.tp)
        return _Held(
            read=positions_in(cut.cp_intervals(place.cp)),
            embedded=positions_in(cut.intervals(shard)),
            cut=cut.documents,
            cp_rank=place.cp,
        )

    def _source_input(self, name: str, packed: PackedInput | None) -> PackedInput | None:
        """This cp rank's part of a source's packed items."""
        replica = self._model.modules[name]
        ranks, rank = replica.groups.spec.cp, replica.groups.place.cp
        if packed is None or ranks == 1:
            return packed
        config = replica.config
        part: PackedInput = source_adapter(config).part(config, packed, rank=rank, ranks=ranks)
        return part

    def _target_inputs(self, text: TextBatch | None) -> TargetInputs:
        assert text is not None and self._groups is not None
        first, last = self._groups.is_first_stage, self._groups.is_last_stage
        reads = first or self.tokens_on_every_stage
        held = self._held(text.lengths) if text.lengths else self._whole

        def part(tokens: Tensor) -> Tensor:
            """This cp rank's part of [B, S]."""
            return tokens[:, held.read]

        return TargetInputs(
            batch=text.input_ids.shape[0],
            input_ids=part(text.input_ids) if reads else None,
            position_ids=part(text.position_ids) if reads else None,
            row_positions=self._row_positions(text.input_ids, held) if first else {},
            labels=part(text.labels) if last else None,
            loss_mask=part(text.loss_mask) if last else None,
            documents=_documents(text, held),
            padding=text.padding[:, held.embedded] if self._reads_padding else None,
            facts=text.facts if self.tokens_on_every_stage else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """What a rank holds of a sequence.

    Attributes:
        read: Positions that its cp rank reads, int64 [s], ascending.
        embedded: Positions whose hidden states the rank has, int64 [s], ascending.
        cut: The cut by documents; None for a sequence that is not packed.
        cp_rank: Its cp rank.
    """

    read: Tensor
    embedded: Tensor
    cut: DocumentCut | None
    cp_rank: int


def _documents(text: TextBatch, held: _Held) -> PackedSegments | None:
    """Boundaries of a packed sequence's documents, as thd kernels read them.

    Transformer Engine takes int32 [N+1], 0 to S without gaps, and the longest length as a number
    on the host: a length read from the device would make every layer wait. The padding is a
    segment too, so that every position is in a segment.
    """
    if text.lengths is None:
        return None
    assert text.cu_seqlens is not None and text.input_ids.shape[0] == 1
    return packed_documents(text.cu_seqlens, text.lengths, held.cut, held.cp_rank)
