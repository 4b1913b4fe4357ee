"""Format of files of saved activations, and their places.

Each rank writes what it holds and no other rank writes, one file for each point and microbatch. A
file has one tensor per sample, named by the sample's key, with the positions of the sample and the
columns of the point that it covers; so runs on different layouts can be compared.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

PROJECTOR, EMBEDDINGS, LOGITS = "projector output", "combined embeddings", "logits"
METADATA = "activations"
POSITIONS = " (positions)"
# In the order of the forward.
POINTS = (PROJECTOR, EMBEDDINGS, LOGITS)


def in_order(points: Iterable[str]) -> list[str]:
    """Points in the order of the forward; those of several sources, "... of NAME", come first."""
    return sorted(points, key=lambda point: (POINTS.index(point.partition(" of ")[0]), point))


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedSample:
    """A tensor of a file: a part of one sample at a point.

    Attributes:
        name: Name of the tensor [n, columns]; its positions, int64 [n], are in `name` + POSITIONS.
        key: Key of the sample.
        lane: Lane that reads the sample.
        microbatch: Microbatch that the sample is part of.
        index: Index among the lane's samples of the microbatch.
        size: Number of positions that the whole sample has at the point.
    """

    name: str
    key: str
    lane: int
    microbatch: int
    index: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedFile:
    """Description of a file, stored in the file.

    Attributes:
        point: Name of the point: one of `POINTS`, with " of NAME" after it for one of several
            sources.
        first_column: First column that the tensors of the file have.
        width: Number of columns of the whole point.
        samples: Description of each tensor.
    """

    point: str
    first_column: int
    width: int
    samples: tuple[SavedSample, ...]

    def to_json(self) -> str:
        """JSON text for the file's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "SavedFile":
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text does not have this format.
        """
        try:
            fields = json.loads(text)
            samples = tuple(SavedSample(**sample) for sample in fields.pop("samples"))
            return cls(samples=samples, **fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not the description of saved activations: {error}") from error


def step_folder(folder: str, iteration: int) -> Path:
    """Path to the folder with the activations of a step."""
    return Path(folder) / f"step-{iteration:08}"
