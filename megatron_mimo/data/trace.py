"""Which samples a rank read in each step, as JSON lines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path


class SampleTrace:
    """Appends one line per step to `rank-<rank>.jsonl`: step, role, lanes, sample keys.

    Args:
        directory: Made if missing.
        rank: Global rank, names the file.
        role: In words, for the reader: "encoder dp 0".
        first_step: Number of the next step.

    Raises:
        ValueError: The folder cannot be written to.
    """

    def __init__(self, directory: str, rank: int, role: str, *, first_step: int = 1) -> None:
        self._role = role
        self._step = first_step
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            path = Path(directory) / f"rank-{rank:05d}.jsonl"
            # Line-buffered: a run that dies leaves every finished step behind.
            self._file = path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"--sample-trace-dir {directory} cannot be written to: {error}"
            ) from error

    def write(self, keys: Mapping[int, Sequence[str]]) -> None:
        """Append a step.

        Args:
            keys: Lane -> sample keys of the step, in order.
        """
        line = {
            "step": self._step,
            "role": self._role,
            "lanes": list(keys),
            "sample_keys": {str(lane): list(of_lane) for lane, of_lane in keys.items()},
        }
        self._file.write(json.dumps(line) + "\n")
        self._step += 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()
