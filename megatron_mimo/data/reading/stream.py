"""The samples of a lane, as a source that can be stopped and continued."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.samples.sample import Draw, Outcome, draw


class LaneStream(Protocol):
    """Sequences of one lane, endless or not."""

    def __next__(self) -> Draw:
        """The next sequence."""
        ...

    def state(self) -> Any:
        """State from which to continue after the last draw, as plain data."""
        ...

    def restore(self, lane: int, lanes: Sequence[Any]) -> None:
        """Continue where a run with `len(lanes)` lanes stopped; call it before the first draw.

        Args:
            lane: Number of this stream's lane.
            lanes: States of all lanes.

        Raises:
            ValueError: The states cannot be distributed to this run's lanes.
        """
        ...


class IndexedStream(Iterator[Draw]):
    """Samples by number, distributed to the lanes.

    Sample `s * GBS + m * (L * B) + l * B + j` is the j-th of lane l in microbatch m of step s.

    Args:
        make: Function that returns the outcome of a sample's number.
        lane: Number of the lane, l.
        num_lanes: Number of lanes, L.
        config: Settings with the batch sizes.
    """

    def __init__(
        self, make: Callable[[int], Outcome], lane: int, num_lanes: int, config: DataConfig
    ) -> None:
        # Steps follow each other without a gap, so the microbatches of all steps form a sequence.
        config.num_microbatches(num_lanes)
        self._make = make
        self._lane, self._num_lanes = lane, num_lanes
        self._size = config.micro_batch_size
        self._max_skips = config.max_skips_in_row
        self._drawn = 0

    def __next__(self) -> Draw:
        found = draw(self._outcomes(), f"lane {self._lane}", self._max_skips)
        assert found is not None
        return found

    def _outcomes(self) -> Iterator[Outcome]:
        while True:
            microbatch, within = divmod(self._drawn, self._size)
            self._drawn += 1
            first = (microbatch * self._num_lanes + self._lane) * self._size
            yield self._make(first + within)

    def state(self) -> Mapping[str, int]:
        """Number of samples that were drawn, as state for `restore`."""
        return {"drawn": self._drawn}

    def restore(self, lane: int, lanes: Sequence[Any]) -> None:
        """Continue; samples are distributed again when the number of lanes has changed.

        Raises:
            ValueError: Lanes have drawn unequal numbers, the sum does not divide, or they read a
                dataset.
        """
        if any("drawn" not in state for state in lanes):
            raise ValueError(
                "--dataset-provider mock cannot go on: the checkpoint's data was read with "
                "energon; start again with --finetune and without --dataloader-load, or give the "
                "dataset"
            )
        drawn = [operator.index(state["drawn"]) for state in lanes]
        if len(lanes) == self._num_lanes:
            self._drawn = drawn[lane]
            return
        whole = self._num_lanes * self._size
        if len(set(drawn)) > 1 or sum(drawn) % whole:
            raise ValueError(
                f"the data cannot go on with {self._num_lanes} lanes: the checkpoint's "
                f"{len(lanes)} lanes have drawn {', '.join(map(str, drawn))} samples, which do "
                f"not deal evenly; keep --llm-dp {len(lanes)}"
            )
        self._drawn = sum(drawn) // self._num_lanes
