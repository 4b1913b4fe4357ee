"""Files of saved activations: what they hold, and where they stand.

Each rank writes what it holds and no other rank does, a file for each point and microbatch. In it
stands, for each sample, a tensor by the sample's key, and which of the sample's positions and of
the point's columns it has; so runs on different layouts can be compared.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

PROJECTOR, EMBEDDINGS, LOGITS = "projector output", "combined embeddings", "logits"
# In the order of the forward.
POINTS = (PROJECTOR, EMBEDDINGS, LOGITS)
METADATA = "activations"
POSITIONS = " (positions)"


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedSample:
    """A tensor of a file: part of what one sample has at a point.

    Attributes:
        name: Of the tensor [n, columns]; its positions int64 [n] are `name` + POSITIONS.
        key: Of the sample.
        lane: That reads it.
        microbatch: It is part of.
        index: Among the lane's samples of the microbatch.
        size: Positions that the whole sample has at the point.
    """

    name: str
    key: str
    lane: int
    microbatch: int
    index: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedFile:
    """What a file says of itself.

    Attributes:
        point: Of `POINTS`.
        first_column: Of the columns that its tensors have.
        width: Columns of the whole point.
        samples: One for each tensor.
    """

    point: str
    first_column: int
    width: int
    samples: tuple[SavedSample, ...]

    def to_json(self) -> str:
        """As a text for the file's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "SavedFile":
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is something else.
        """
        try:
            fields = json.loads(text)
            samples = tuple(SavedSample(**sample) for sample in fields.pop("samples"))
            return cls(samples=samples, **fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not the description of saved activations: {error}") from error


def step_folder(folder: str, iteration: int) -> Path:
    """Where the activations of a step stand."""
    return Path(folder) / f"step-{iteration:08}"
