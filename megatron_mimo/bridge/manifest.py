"""What crosses the bridge in one microbatch, as integers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One image on its way from the encoder to the language model.

    Attributes:
        lane: LLM dp rank whose tokens hold the image.
        encoder_rank: Encoder dp rank that runs it.
        rows: Embedding vectors that it becomes.
    """

    lane: int
    encoder_rank: int
    rows: int


# The images of a microbatch in canonical order: by lane, then sample, then image. A rank's manifest
# lists only the lanes it takes part in; two ranks that exchange rows see the same entries for the
# lane they share, so both derive the same plan and no shape is ever sent.
Manifest = tuple[ManifestEntry, ...]
