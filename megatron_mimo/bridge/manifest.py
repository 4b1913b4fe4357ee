"""The rows that cross the bridges in one microbatch, described by integers."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestEntry:
    """Rows of one item on their way from its module to the target.

    An item whose rows do not stand in one piece in its sequence has an entry for each piece.

    Attributes:
        module: Name of the module that runs the item.
        source_rank: The dp rank of that module that runs it.
        lane: The dp rank of the target whose tokens hold the item.
        rows: Number of rows (embedding vectors) of the item, or of this piece of it.
        sequence: Index of its sequence in the lane's microbatch.
        start: Position of the first row in the sequence; the others follow it.
    """

    module: str
    source_rank: int
    lane: int
    rows: int
    sequence: int
    start: int


# The items of a microbatch in canonical order: by lane, then sequence, then position. A rank's
# manifest has all the entries of each lane that it takes part in, and no others.
Manifest = tuple[ManifestEntry, ...]

# Lane -> number of tokens of each document of its packed sequence, and of the padding after them,
# for every lane of a manifest; empty without packing. Context parallelism cuts sequences by them.
Documents = Mapping[int, tuple[int, ...]]
WHOLE: Documents = MappingProxyType({})
