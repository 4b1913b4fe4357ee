"""What crosses the bridge in one microbatch, as integers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """Rows of one image on their way from the encoder to the language model.

    An image whose rows do not stand in one piece in its sequence has an entry for each piece.

    Attributes:
        lane: LLM dp rank whose tokens hold the image.
        encoder_rank: Encoder dp rank that runs it.
        rows: Embedding vectors that it becomes.
        sequence: Index of its sequence in the lane's microbatch.
        start: Position of the first row in the sequence; the others follow it.
    """

    lane: int
    encoder_rank: int
    rows: int
    sequence: int
    start: int


# The images of a microbatch in canonical order: by lane, then sequence, then position. A rank's
# manifest has all the entries of each lane that it takes part in, and no others.
Manifest = tuple[ManifestEntry, ...]
