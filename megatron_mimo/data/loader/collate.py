"""Collation of samples to one batch, field by field. Nothing is guessed from shapes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_mimo.data.inputs import Inputs, Item
from megatron_mimo.data.loader.batch import TextBatch
from megatron_mimo.data.samples.sample import EncodedSample

# The samples that share a sequence, in order.
Documents = tuple[EncodedSample, ...]

# The fields that can be merged over the samples of all lanes: tokens and targets are concatenated
# or padded, lane by lane; the items of each module are in the manifest's order. A flaw is counted
# before. The fields of an item are merged by its input's `pack`.
_FIELDS = frozenset({"key", "tokens", "targets", "items", "flaw"})


def require_known_fields(sample: EncodedSample, where: str, inputs: Inputs) -> None:
    """Refuse fields that merging would otherwise drop, or mix between lanes.

    Args:
        sample: Sample from a reader.
        where: Name of the reader for error messages.
        inputs: Kinds of items of the run.

    Raises:
        TypeError: The sample or one of its items has another type or an unknown field, or an item
            is of a module that the run does not have.
    """
    _require(sample, EncodedSample, _FIELDS, where)
    where = f"{where}, sample {sample.key!r}"
    for module, items in sample.items.items():
        if module not in inputs:
            raise TypeError(
                f"{where}: merging does not know the module {module!r} of an item: expected "
                f"{', '.join(inputs)}; a module's input belongs into the settings"
            )
        types = [kind.item_type for name, kind in inputs.items() if (kind.feeds or name) == module]
        for item in items:
            _require_item(item, types, where)


def _require_item(item: Item, types: Sequence[type[Any]], where: str) -> None:
    # The types that the inputs name only have fields that the inputs know.
    if type(item) not in types:
        wanted = next((known for known in types if isinstance(item, known)), types[0])
        _require(item, wanted, frozenset(field.name for field in fields(wanted)), where)


def _require(value: Any, wanted: type[Any], known: frozenset[str], where: str) -> None:
    unknown = _unknown_fields(type(value), wanted, known)
    if unknown:
        raise TypeError(
            f"{where}: merging does not know the {unknown} of a {type(value).__name__}: expected "
            f"{wanted.__name__} with {', '.join(sorted(known))}; {__name__} says how each is merged"
        )


def _unknown_fields(kind: type[Any], wanted: type[Any], known: frozenset[str]) -> str:
    if not is_dataclass(kind) or not issubclass(kind, wanted):
        return "type"
    names = [field.name for field in fields(kind) if field.name not in known]
    return f"field {', '.join(map(repr, names))}" if names else ""


def placed(sequences: Sequence[Documents]) -> Iterator[tuple[tuple[int, int], EncodedSample]]:
    """Every document, with the index of its sequence and the position at which it begins."""
    for sequence, documents in enumerate(sequences):
        start = 0
        for document in documents:
            yield (sequence, start), document
            start += document.num_positions


def runs_of(positions: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Split ascending positions, int64 [N], into runs of consecutive ones: (first, length)."""
    if not len(positions):
        return []
    pieces = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return [(int(piece[0]), len(piece)) for piece in pieces]


class HasItems(Protocol):
    """A sample or a question."""

    @property
    def items(self) -> Mapping[str, Sequence[Item]]:
        """Module -> its items in token order."""


def collate_facts(samples: Sequence[HasItems], inputs: Inputs) -> dict[str, Tensor]:
    """What the target needs of the items beside their rows, by name, int64 [N, ...].

    Args:
        samples: Samples of a lane's microbatch, in the order of sequences and positions.
        inputs: Kinds of items of the run.
    """
    found: dict[str, list[Sequence[int]]] = {}
    for sample in samples:
        for module, items in sample.items.items():
            for item in items:
                for name, values in inputs[module].facts(item).items():
                    found.setdefault(name, []).append(values)
    return {name: torch.tensor(values, dtype=torch.int64) for name, values in found.items()}


def collate_text(samples: Sequence[EncodedSample], seq_length: int, pad_id: int) -> TextBatch:
    """Stack token sequences, padded to S, to tensors [B, S] with labels shifted by one."""
    batch = len(samples)
    input_ids = np.full((batch, seq_length), pad_id, dtype=np.int64)
    labels = np.full((batch, seq_length), pad_id, dtype=np.int64)
    loss_mask = np.zeros((batch, seq_length), dtype=np.float32)
    padding = np.ones((batch, seq_length), dtype=np.bool_)
    for i, sample in enumerate(samples):
        length = sample.num_positions
        input_ids[i, :length] = sample.tokens[:-1]
        labels[i, :length] = sample.tokens[1:]
        loss_mask[i, :length] = sample.targets[1:]
        padding[i, :length] = False
    return TextBatch(
        sample_keys=tuple(sample.key for sample in samples),
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.arange(seq_length).expand(batch, -1).contiguous(),
        padding=torch.from_numpy(padding),
    )


def packed_lengths(documents: Documents, seq_length: int) -> tuple[int, ...]:
    """Number of tokens of each document of a packed sequence, and of the padding, if any."""
    lengths = [document.num_positions for document in documents]
    if sum(lengths) < seq_length:
        lengths.append(seq_length - sum(lengths))
    return tuple(lengths)


def collate_packed(documents: Documents, seq_length: int, pad_id: int) -> TextBatch:
    """Concatenate documents to one sequence [1, S] with padding; labels are shifted within each.

    The padding is a separate segment, so that every position belongs to a segment.
    """
    input_ids = np.full(seq_length, pad_id, dtype=np.int64)
    labels = np.full(seq_length, pad_id, dtype=np.int64)
    loss_mask = np.zeros(seq_length, dtype=np.float32)
    padding = np.ones(seq_length, dtype=np.bool_)
    lengths = packed_lengths(documents, seq_length)
    bounds = np.cumsum([0, *lengths])
    for start, document in zip(bounds.tolist(), documents, strict=False):
        stop = start + document.num_positions
        input_ids[start:stop] = document.tokens[:-1]
        labels[start:stop] = document.tokens[1:]
        loss_mask[start:stop] = document.targets[1:]
        padding[start:stop] = False
    position_ids = np.arange(seq_length) - np.repeat(bounds[:-1], lengths)
    return TextBatch(
        sample_keys=tuple(document.key for document in documents),
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        loss_mask=torch.from_numpy(loss_mask)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        padding=torch.from_numpy(padding)[None],
        lengths=lengths,
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
    )
