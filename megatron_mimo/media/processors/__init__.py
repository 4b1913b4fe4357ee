"""Images as a folder's own processor of transformers makes them, for its own vision tower."""

from megatron_mimo.media.processors.family import FAMILIES, ProcessorFamily
from megatron_mimo.media.processors.input import ProcessorInput
from megatron_mimo.media.processors.packed import ProcessedImage, ProcessedImages
from megatron_mimo.media.processors.read import read_processor

__all__ = [
    "FAMILIES",
    "ProcessedImage",
    "ProcessedImages",
    "ProcessorFamily",
    "ProcessorInput",
    "read_processor",
]
