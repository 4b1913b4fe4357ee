"""Reading a dataset once, as training reads it, and recording the result of each sample."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron.energon import (
    LimitDataset,
    SavableDataset,
    WorkerConfig,
    get_val_dataset,
    stateless,
)
from megatron.energon.errors import reraise_exception
from megatron.energon.savable_loader import SavableDataLoader

from megatron_mimo.border import border
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.reading.dataset_code import only_energons
from megatron_mimo.data.reading.dataset_errors import (
    checked_path,
    unreadable_shard,
    unreadable_split,
)
from megatron_mimo.data.reading.task_encoder import MimoTaskEncoder
from megatron_mimo.data.samples.media import check_roots
from megatron_mimo.data.samples.sample import (
    EncodedSample,
    Outcome,
    RawSample,
    SkippedSample,
    name_source,
)
from megatron_mimo.data.text.tokenizer import Tokenizer
from megatron_mimo.settings.ranges import MOST_POSITIONS
from megatron_mimo.tools.data.statistics import Observation, kind_of_message

Split = Literal["train", "val"]
_ENDLESS = MOST_POSITIONS


def in_stored_order(config: DataConfig, split: Split, encoder: MimoTaskEncoder) -> Iterator[Any]:
    """What a task encoder makes of each sample of a split, once and in stored order.

    The dataset is opened at once, and read as the iterator goes on.

    Args:
        config: Settings with the path of a dataset or blend.
        split: Name of the split.
        encoder: The task encoder.

    Raises:
        ValueError: The dataset cannot be opened, or, later, a shard cannot be read.
    """
    assert config.path is not None
    path = checked_path(config.path)
    check_roots(config.media_root)
    with (
        only_energons(path, trust=config.trust_dataset_code),
        border(lambda why: unreadable_split(path, split, why)),
    ):
        dataset: Any = get_val_dataset(
            config.path,
            split_part=split,
            worker_config=WorkerConfig(
                rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception
            ),
            # Single samples, although energon's type hint requires a size.
            batch_size=None,
            packing_buffer_size=config.packing_buffer_size,
            task_encoder=encoder,
        )
    loader: Any = SavableDataLoader(dataset, gc_collect_every_n_steps=0)
    loader.pin_memory = False
    return _outcomes(loader, path)


def _outcomes(loader: Any, path: str) -> Iterator[Any]:
    outcomes = iter(loader)
    while True:
        try:
            outcome = next(outcomes, None)
        # Outcomes are values: whatever is raised comes from energon over the dataset's files.
        except Exception as error:
            raise ValueError(unreadable_shard(path, error)) from error
        if outcome is None:
            return
        yield outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """A sequence as training would read it.

    Attributes:
        documents: Samples that share the sequence, without content of their items.
        stored: Stored forms of these samples, in the same order.
        numbers: Numbers of these samples in the order of reading.
    """

    documents: tuple[EncodedSample, ...]
    stored: tuple[Any, ...]
    numbers: tuple[int, ...]


class DatasetReader:
    """Reads one split of a dataset or blend: each sample once, in stored order.

    Args:
        config: Settings of the dataset, and of encoding and packing samples.
        split: Name of the split.
        tokenizer: Tokenizer of the texts.
        observe: Function that is called with the result of every stored sample.
        limit: Largest number of samples of each dataset of a blend.
        decode: Whether to decode every item; otherwise only headers are read.

    Raises:
        ValueError: The dataset cannot be opened.
    """

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        tokenizer: Tokenizer,
        observe: Callable[[Observation], None],
        *,
        limit: int | None = None,
        decode: bool = False,
    ) -> None:
        self._encoder = _WatchedEncoder(config, tokenizer, observe, limit=limit, decode=decode)
        self._outcomes = in_stored_order(config, split, self._encoder)

    def sequences(self) -> Iterator[Sequence]:
        """Sequences in the order of reading.

        Raises:
            ValueError: A shard cannot be read.
        """
        for outcome in self._outcomes:
            # torch's loader makes lists of tuples.
            documents = tuple(outcome) if isinstance(outcome, list | tuple) else (outcome,)
            if isinstance(documents[0], EncodedSample):
                numbered = [self._encoder.release(document) for document in documents]
                yield Sequence(
                    documents=documents,
                    stored=tuple(stored for _, stored in numbered),
                    numbers=tuple(number for number, _ in numbered),
                )

    def with_content(self, sequence: Sequence) -> tuple[EncodedSample, ...]:
        """The documents of a sequence with decoded items."""
        outcomes = [self._encoder.decoded(stored) for stored in sequence.stored]
        # Whether a sample is used never depends on its pixels.
        documents = tuple(o for o in outcomes if isinstance(o, EncodedSample))
        assert len(documents) == len(outcomes), outcomes
        return documents

    def as_stored(self, sequence: Sequence) -> tuple[RawSample, ...]:
        """The documents of a sequence with the files of their items."""
        parsed = [self._encoder.parse(stored) for stored in sequence.stored]
        samples = tuple(sample for sample in parsed if isinstance(sample, RawSample))
        assert len(samples) == len(parsed), parsed
        return samples


class _WatchedEncoder(MimoTaskEncoder):
    """Encodes as training does, and reports the result of each sample."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        observe: Callable[[Observation], None],
        *,
        limit: int | None,
        decode: bool,
    ) -> None:
        super().__init__(config, tokenizer, content=())
        alone = replace(config, packing_buffer_size=None)
        endless = replace(alone, seq_length=_ENDLESS)
        self._full = MimoTaskEncoder(alone, tokenizer, content=tuple(config.inputs))
        self._endless = MimoTaskEncoder(endless, tokenizer, content=())
        self._decode = decode
        self._seq_length = config.seq_length
        self._observe = observe
        self._limit = limit
        # Samples that wait for their sequence: by identity, as keys may repeat in a blend.
        self._waiting: dict[int, tuple[EncodedSample, int, Any]] = {}
        self._num_seen = 0

    def build_cook_crude_sample(
        self, dataset: SavableDataset[Any], **settings: Any
    ) -> SavableDataset[Any]:
        """Build the first stage of energon's pipeline, once per dataset."""
        cooked = super().build_cook_crude_sample(dataset, **settings)
        if self._limit is None:
            return cooked
        return LimitDataset(cooked, self._limit, worker_config=settings["worker_config"])

    @stateless  # type: ignore[untyped-decorator]
    def encode_sample(self, sample: Any) -> Any:
        """Encode a sample."""
        encoded = super().encode_sample(sample)
        # Packing wraps it.
        outcome: Outcome = getattr(encoded, "outcome", encoded)
        number = self._num_seen
        self._num_seen += 1
        sources = sample.__sources__
        dataset = str(sources[0].dataset_path) if sources else "an unknown dataset"
        shard = str(sources[0].shard_name) if sources else ""
        kind, reason, positions = "", "", 0
        match outcome:
            case EncodedSample():
                self._waiting[id(outcome)] = (outcome, number, sample)
                positions = outcome.num_positions
            case SkippedSample():
                kind, reason = outcome.kind, outcome.reason
                if kind == "too long":
                    positions = self._endless.encode_sample(sample).num_positions
            case _:
                named = f"sample {sample.__key__!r} of {name_source(dataset, shard)}"
                reason = outcome.message.removeprefix(named).lstrip(" :")
                kind = f"stops training: {kind_of_message(reason)}"
        encodes = isinstance(outcome, EncodedSample)
        observed: Outcome = self.decoded(sample) if encodes and self._decode else outcome
        self._observe(
            Observation(
                number=number,
                key=sample.__key__,
                source=dataset,
                shard=shard,
                sample=observed if isinstance(observed, EncodedSample) else None,
                kind=kind,
                reason=reason,
                positions=positions,
            )
        )
        return encoded

    def decoded(self, stored: Any) -> Outcome:
        """Result of encoding a stored sample with its pixels."""
        outcome: Outcome = self._full.encode_sample(stored)
        return outcome

    def release(self, outcome: EncodedSample) -> tuple[int, Any]:
        """Number and stored form of a sample that has become part of a sequence."""
        _, number, stored = self._waiting.pop(id(outcome))
        return number, stored
