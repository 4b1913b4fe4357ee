"""A lane's samples, as a source that can be stopped and gone on with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.sample import Draw, Outcome, draw


class LaneStream(Protocol):
    """Sequences of one lane, endless or not."""

    def __next__(self) -> Draw:
        """The next one."""
        ...

    def state(self) -> Any:
        """All that is needed to go on behind the last draw; plain data."""
        ...

    def restore(self, lane: int, lanes: Sequence[Any]) -> None:
        """Go on where a run with `len(lanes)` lanes stopped; before the first draw.

        Args:
            lane: This stream's.
            lanes: The states of all of them.

        Raises:
            ValueError: They cannot be shared out among this run's lanes.
        """
        ...


class IndexedStream(Iterator[Draw]):
    """Samples by number, dealt to the lanes.

    Sample `s * GBS + m * (L * B) + l * B + j` is the j-th of lane l in microbatch m of step s.

    Args:
        make: Gives the outcome of a number.
        lane: l.
        num_lanes: L.
        config: Batch sizes.
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
        """How many samples were drawn."""
        return {"drawn": self._drawn}

    def restore(self, lane: int, lanes: Sequence[Any]) -> None:
        """Go on; samples are shared out anew when the number of lanes has changed.

        Raises:
            ValueError: Lanes have drawn unequal numbers, or their sum does not divide; or the
                checkpoint is of another kind of data.
        """
        if any("drawn" not in state for state in lanes):
            raise ValueError(
                "--dataset-provider mock: the checkpoint's data was read with energon; keep "
                "--dataset-provider energon, or use --finetune to begin with made-up samples"
            )
        drawn = [state["drawn"] for state in lanes]
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
