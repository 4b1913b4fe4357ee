"""Records of the samples that a rank reads in each step, as JSON lines."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_mimo.runtime.output import LastingFile, named_errors, require_folder, unwritable

logger = logging.getLogger(__name__)


class SampleTrace:
    """Appends one line per step to `rank-<rank>.jsonl`: step, role, lanes, sample keys.

    Args:
        directory: Folder of the file; created if missing.
        rank: Global rank, which is a part of the file's name.
        role: Role of the rank in words: "encoder dp 0".
        first_step: Number of the next step.

    Raises:
        ValueError: The folder cannot be written to.
    """

    def __init__(self, directory: str, rank: int, role: str, *, first_step: int = 1) -> None:
        self._role, self._where = role, f"--sample-trace-dir {directory}"
        self._step = first_step
        require_folder("--sample-trace-dir", Path(directory))
        try:
            self._file = LastingFile(Path(directory) / f"rank-{rank:05d}.jsonl")
        except OSError as error:
            raise unwritable(self._where, error) from error

    def write(self, keys: Mapping[int, Sequence[str]]) -> None:
        """Append a step.

        Args:
            keys: Lane -> sample keys of the step, in order.

        Raises:
            RuntimeError: The line cannot be written, for instance to a full disk.
        """
        line = {
            "step": self._step,
            "role": self._role,
            "lanes": list(keys),
            "sample_keys": {str(lane): list(of_lane) for lane, of_lane in keys.items()},
        }
        with named_errors(f"to {self._where}"):
            if self._file.has_vanished:
                self._file.begin_again()
                logger.warning(
                    "%s was removed while the run writes to it: begun again from step %d on",
                    *(self._file.path, self._step),
                )
            self._file.append((json.dumps(line) + "\n").encode())
        self._step += 1

    def close(self) -> None:
        """Close the file.

        Raises:
            RuntimeError: What was written before is not on the disk.
        """
        with named_errors(f"to {self._where}"):
            self._file.close()
