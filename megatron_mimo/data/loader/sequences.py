"""Packing as a stage of energon's readers: from a buffer of samples to sequences of samples."""

from collections.abc import Callable, Iterator
from typing import Any

from megatron.energon import Sample, SavableDataset, WorkerConfig, edataclass
from megatron.energon.wrappers.base import BaseWrapperDataset
from megatron.energon.wrappers.buffer import SavableSampleBuffer

from megatron_mimo.data.loader.packing import Group, plan_round
from megatron_mimo.data.samples.sample import EncodedSample, Outcome, RawSample


@edataclass
class PackableSample(Sample):
    """An outcome with the key under which energon reads it again: buffers save only keys.

    Attributes:
        outcome: Result of encoding the stored sample, without content of its items.
        raw: Stored sample, where the content of its items is needed; else None.
    """

    outcome: Outcome
    raw: RawSample | None = None


class SequenceDataset(BaseWrapperDataset[PackableSample, Any]):
    """Yields `tuple[EncodedSample, ...]`, the documents of one sequence, in order of arrival.

    Whenever all groups of a round have been returned, a full buffer is packed again (`plan_round`),
    and its emptiest group stays in it for the next round. energon's own stage for packing cannot do
    this: it loses samples that its packer does not use at once. Samples that cannot be used are
    passed on one by one, spread evenly between the sequences.

    Args:
        dataset: Dataset of the outcomes of single samples, which must be able to restore them.
        buffer_size: Number of samples to choose from.
        seq_length: Number of positions of a sequence; a sample's last token is only a target and
            takes none.
        add_content: Function that decodes the items of a sample that is returned.
        worker_config: Energon's settings of the worker.
    """

    # The part of energon's interface by which a stage names its state.
    _savable_fields = ("_waiting", "_leaving", "_sizes", "_num_held")

    def __init__(
        self,
        dataset: SavableDataset[PackableSample],
        buffer_size: int,
        seq_length: int,
        add_content: Callable[[EncodedSample, RawSample], EncodedSample],
        *,
        worker_config: WorkerConfig,
    ) -> None:
        super().__init__(dataset, worker_config=worker_config)
        self._buffer_size = buffer_size
        self._seq_length = seq_length
        self._add_content = add_content
        self.reset_state_own()

    def reset_state_own(self) -> None:
        """Remove every sample."""
        buffers = (
            SavableSampleBuffer(self.dataset, worker_config=self.worker_config) for _ in range(2)
        )
        # Samples yet to be packed, those that were kept first; the round's groups, concatenated.
        self._waiting, self._leaving = buffers
        self._sizes: list[int] = []
        self._num_held = 0

    def len_worker(self, worker_idx: int | None = None) -> int:
        """Number of samples; that of sequences depends on their lengths."""
        length: int = self.dataset.len_worker(worker_idx)
        return length

    def __iter__(self) -> Iterator[Outcome | tuple[EncodedSample, ...]]:
        """Sequences, and samples that cannot be used."""
        source = iter(self.dataset)
        self._waiting.worker_start()
        self._leaving.worker_start()
        more = True
        while True:
            # A little with each sequence, so that none of them waits for a whole buffer.
            while more and len(self._waiting.buffer) + sum(self._sizes) < self._buffer_size:
                sample = next(source, None)
                if sample is None:
                    more = False
                else:
                    self._waiting.append(sample)
            if not self._sizes:
                if not self._waiting.buffer:
                    return
                self._begin_round()
            yield self._next_sequence()

    def _begin_round(self) -> None:
        """Distribute the waiting samples to groups."""
        samples = list(self._waiting.buffer)
        whole, bad, lengths = [], [], []
        for i, sample in enumerate(samples):
            if isinstance(sample.outcome, EncodedSample):
                whole.append(i)
                lengths.append(sample.outcome.num_positions)
            else:
                bad.append(i)
        planned = plan_round(lengths, self._seq_length, self._num_held)
        self._waiting.clear()
        self._waiting.extend([samples[whole[i]] for i in planned.held])
        self._num_held = len(planned.held)
        for group in _spread(bad, [tuple(whole[i] for i in group) for group in planned.leaving]):
            self._leaving.extend([samples[i] for i in group])
            self._sizes.append(len(group))

    def _next_sequence(self) -> Outcome | tuple[EncodedSample, ...]:
        size = self._sizes.pop(0)
        samples = self._leaving[:size]
        del self._leaving[:size]
        documents = []
        for sample in samples:
            outcome: Outcome = sample.outcome
            if not isinstance(outcome, EncodedSample):
                return outcome
            whole = outcome if sample.raw is None else self._add_content(outcome, sample.raw)
            documents.append(whole)
        return tuple(documents)

    def can_restore_sample(self) -> bool:
        """Sequences have no keys."""
        return False

    def assert_can_restore(self) -> None:
        """Sequences have no keys."""
        raise AssertionError("sequences of several samples cannot be restored by a key")

    def config(self) -> dict[str, Any]:
        """Settings that energon compares when a state is restored."""
        return {
            "type": type(self).__qualname__,
            "buffer_size": self._buffer_size,
            "seq_length": self._seq_length,
            "worker_config": self.worker_config.config(),
            "dataset": self.dataset.config(),
        }


def _spread(bad: list[int], groups: list[Group]) -> Iterator[Group]:
    """Place single bad samples before the groups, equal numbers before each."""
    done = 0
    for number, group in enumerate(groups, 1):
        share = len(bad) * number // len(groups)
        yield from ((i,) for i in bad[done:share])
        done = share
        yield group
    yield from ((i,) for i in bad[done:])
