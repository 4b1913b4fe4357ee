"""Packing as a stage of energon's readers: a buffer of samples in, the samples of sequences out."""

from collections.abc import Callable, Iterator
from typing import Any

from megatron.energon import Sample, SavableDataset, WorkerConfig, edataclass
from megatron.energon.wrappers.base import BaseWrapperDataset
from megatron.energon.wrappers.buffer import SavableSampleBuffer

from megatron_mimo.data.packing import Group, plan_round
from megatron_mimo.data.sample import EncodedSample, Outcome, RawSample


@edataclass
class PackableSample(Sample):
    """An outcome with the key under which energon reads it again: buffers save keys alone.

    Attributes:
        outcome: What became of the stored sample, without patches.
        raw: The sample, where the patches are needed.
    """

    outcome: Outcome
    raw: RawSample | None = None


class SequenceDataset(BaseWrapperDataset[PackableSample, Any]):
    """Yields `tuple[EncodedSample, ...]`, the documents of one sequence, in order of arrival.

    Whenever all groups of a round have gone out, a full buffer is packed anew (`plan_round`), and
    its emptiest group waits in it for the next round. energon's own stage for packing has no such
    way back: what its packer does not use at once is lost. Samples that cannot be used pass
    through by themselves, spread evenly between the sequences.

    Args:
        dataset: Outcomes of single samples; must be able to restore them.
        buffer_size: Samples to choose from.
        seq_length: Tokens of a sequence; a sample's last token takes none: it is only a target.
        add_patches: Decodes the images of a sample that leaves.
        worker_config: Of the dataset.
    """

    # The part of energon's interface by which a stage names its state.
    _savable_fields = ("_waiting", "_leaving", "_sizes", "_num_held")

    def __init__(
        self,
        dataset: SavableDataset[PackableSample],
        buffer_size: int,
        seq_length: int,
        add_patches: Callable[[EncodedSample, RawSample], EncodedSample],
        *,
        worker_config: WorkerConfig,
    ) -> None:
        super().__init__(dataset, worker_config=worker_config)
        self._buffer_size = buffer_size
        self._seq_length = seq_length
        self._add_patches = add_patches
        self.reset_state_own()

    def reset_state_own(self) -> None:
        """Forget every sample."""
        buffers = (
            SavableSampleBuffer(self.dataset, worker_config=self.worker_config) for _ in range(2)
        )
        # Samples yet to be packed, those held back first; and the round's groups, end to end.
        self._waiting, self._leaving = buffers
        self._sizes: list[int] = []
        self._num_held = 0

    def len_worker(self, worker_idx: int | None = None) -> int:
        """Samples; how many sequences they make depends on their lengths."""
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
        """Deal the waiting samples to groups."""
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
            patched = outcome if sample.raw is None else self._add_patches(outcome, sample.raw)
            documents.append(patched)
        return tuple(documents)

    def can_restore_sample(self) -> bool:
        """Sequences have no keys."""
        return False

    def assert_can_restore(self) -> None:
        """Sequences have no keys."""
        raise AssertionError("sequences of several samples cannot be restored by a key")

    def config(self) -> dict[str, Any]:
        """What energon compares when a state is restored."""
        return {
            "type": type(self).__qualname__,
            "buffer_size": self._buffer_size,
            "seq_length": self._seq_length,
            "worker_config": self.worker_config.config(),
            "dataset": self.dataset.config(),
        }


def _spread(bad: list[int], groups: list[Group]) -> Iterator[Group]:
    """Single bad samples in front of the groups, as many for each."""
    done = 0
    for number, group in enumerate(groups, 1):
        share = len(bad) * number // len(groups)
        yield from ((i,) for i in bad[done:share])
        done = share
        yield group
    yield from ((i,) for i in bad[done:])
