"""Many samples to one batch: which field of a sample goes where. Nothing is guessed from shapes."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mimo.data.batch import TextBatch
from megatron_mimo.data.sample import EncodedSample
from megatron_mimo.images import EncodedImage

# The samples that share a sequence, in order.
Documents = tuple[EncodedSample, ...]

# What merging over the samples of all lanes knows what to do with: tokens and targets end to end or
# padded, a lane at a time; images in the manifest's order, their patches along tokens whatever
# their shapes, their grids along images. A flaw is counted before.
_FIELDS: dict[type[Any], frozenset[str]] = {
    EncodedSample: frozenset({"key", "tokens", "targets", "images", "flaw"}),
    EncodedImage: frozenset({"grids", "rows", "patches"}),
}


def require_known_fields(sample: EncodedSample, where: str) -> None:
    """Refuse what merging would otherwise drop, or mix between lanes.

    Args:
        sample: As a reader made it.
        where: Names the reader in the error.

    Raises:
        TypeError: The sample or one of its images has a field that is not known, or is none.
    """
    _require(sample, EncodedSample, where)
    for image in sample.images:
        _require(image, EncodedImage, f"{where}, sample {sample.key!r}")


def _require(value: Any, wanted: type[Any], where: str) -> None:
    unknown = _unknown_fields(type(value), wanted)
    if unknown:
        raise TypeError(
            f"{where}: merging does not know the {unknown} of a {type(value).__name__}: expected "
            f"{wanted.__name__} with {', '.join(sorted(_FIELDS[wanted]))}; {__name__} says how "
            f"each is merged"
        )


def _unknown_fields(kind: type[Any], wanted: type[Any]) -> str:
    if not is_dataclass(kind) or not issubclass(kind, wanted):
        return "type"
    names = [field.name for field in fields(kind) if field.name not in _FIELDS[wanted]]
    return f"field {', '.join(map(repr, names))}" if names else ""


def placed(sequences: Sequence[Documents]) -> Iterator[tuple[tuple[int, int], EncodedSample]]:
    """Every document, with its sequence and the position at which it begins."""
    for sequence, documents in enumerate(sequences):
        start = 0
        for document in documents:
            yield (sequence, start), document
            start += document.num_positions


def runs_of(positions: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cut ascending positions into runs of consecutive ones: (first, length)."""
    if not len(positions):
        return []
    pieces = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return [(int(piece[0]), len(piece)) for piece in pieces]


def collate_text(samples: Sequence[EncodedSample], seq_length: int, pad_id: int) -> TextBatch:
    """Stack token sequences, padded to S, with labels shifted by one."""
    batch = len(samples)
    input_ids = np.full((batch, seq_length), pad_id, dtype=np.int64)
    labels = np.full((batch, seq_length), pad_id, dtype=np.int64)
    loss_mask = np.zeros((batch, seq_length), dtype=np.float32)
    for i, sample in enumerate(samples):
        length = sample.num_positions
        input_ids[i, :length] = sample.tokens[:-1]
        labels[i, :length] = sample.tokens[1:]
        loss_mask[i, :length] = sample.targets[1:]
    return TextBatch(
        sample_keys=tuple(sample.key for sample in samples),
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.arange(seq_length).expand(batch, -1).contiguous(),
    )


def collate_packed(documents: Documents, seq_length: int, pad_id: int) -> TextBatch:
    """Lay documents end to end in one sequence, padded to S; labels are shifted within each.

    The padding is a segment of its own, so that every position belongs to one.
    """
    input_ids = np.full(seq_length, pad_id, dtype=np.int64)
    labels = np.full(seq_length, pad_id, dtype=np.int64)
    loss_mask = np.zeros(seq_length, dtype=np.float32)
    lengths = [document.num_positions for document in documents]
    if sum(lengths) < seq_length:
        lengths.append(seq_length - sum(lengths))
    bounds = np.cumsum([0, *lengths])
    for start, document in zip(bounds.tolist(), documents, strict=False):
        stop = start + document.num_positions
        input_ids[start:stop] = document.tokens[:-1]
        labels[start:stop] = document.tokens[1:]
        loss_mask[start:stop] = document.targets[1:]
    position_ids = np.arange(seq_length) - np.repeat(bounds[:-1], lengths)
    return TextBatch(
        sample_keys=tuple(document.key for document in documents),
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        loss_mask=torch.from_numpy(loss_mask)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        lengths=tuple(lengths),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
    )
