"""Save what passes three points of the model in one step, for `megatron-mimo parity --tensors`.

Hooks on the modules do it, which come with the step and go with its last microbatch.
"""

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_mimo.data.batch import Microbatch, ResumableLoader, StepData
from megatron_mimo.model.merge import positions_in
from megatron_mimo.model.mimo import MimoModel
from megatron_mimo.training.saved_activations import (
    EMBEDDINGS,
    LOGITS,
    METADATA,
    POSITIONS,
    PROJECTOR,
    SavedFile,
    SavedSample,
    step_folder,
)
from megatron_mimo.training.step import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a rank holds of one sample at a point.

    Attributes:
        lane: That reads the sample.
        index: Among the lane's samples of the microbatch.
        size: Positions of the whole sample.
        positions: int64 [n], held here, counted from the sample's first.
        rows: int64 [n], where they are in the rank's tensor.
    """

    lane: int
    index: int
    size: int
    positions: Tensor
    rows: Tensor


def row_parts(microbatch: Microbatch, encoder_rank: int) -> Iterator[Part]:
    """The samples whose rows an encoder rank makes; positions are those of the image tokens.

    Args:
        microbatch: With the manifest of the lanes that the rank serves.
        encoder_rank: The rank's place along dp.
    """
    held: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    sizes: dict[tuple[int, int], int] = {}
    offset = 0
    for entry in microbatch.manifest:
        index, start = _sample_at(microbatch, entry.lane, (entry.sequence, entry.start))
        sample = entry.lane, index
        sizes[sample] = sizes.get(sample, 0) + entry.rows
        if entry.encoder_rank == encoder_rank:
            held.setdefault(sample, []).append((entry.start - start, offset, entry.rows))
            offset += entry.rows
    for (lane, index), pieces in held.items():
        yield Part(
            lane=lane,
            index=index,
            size=sizes[lane, index],
            positions=positions_in((first, first + count) for first, _, count in pieces),
            rows=positions_in((row, row + count) for _, row, count in pieces),
        )


def token_parts(microbatch: Microbatch, lane: int, held: Tensor) -> Iterator[Part]:
    """The samples of a lane as far as a rank has their tokens; padding behind documents is none's.

    Args:
        microbatch: With the lane's text.
        lane: The rank's.
        held: int64 [s], ascending positions of a sequence that the rank has.

    Yields:
        Parts whose rows count through [s * B], as of a tensor [s, B, ...] without its last axis.
    """
    text = microbatch.text
    assert text is not None
    batch, length = text.input_ids.shape
    for index, (sequence, start) in enumerate(_starts(microbatch, lane)):
        size = length if text.lengths is None else text.lengths[index]
        inside = ((held >= start) & (held < start + size)).nonzero().flatten()
        yield Part(
            lane=lane,
            index=index,
            size=size,
            positions=held[inside] - start,
            rows=inside * batch + sequence,
        )


class RecordingLoader(ResumableLoader):
    """Hands steps on, and saves the activations of one of them while it runs.

    Args:
        source: The steps.
        engine: Of this rank.
        folder: Gets a folder of the step.
        first: Iteration that the source's next step is.
        last: Iteration that training ends with.
        iteration: Whose activations to save; None for the first.

    Raises:
        ValueError: The iteration lies outside the run, or was saved there before.
    """

    def __init__(
        self,
        source: ResumableLoader,
        engine: Engine,
        folder: str,
        *,
        first: int,
        last: int,
        iteration: int | None,
    ) -> None:
        self._source, self._engine = source, engine
        self._next, self._wanted = first, first if iteration is None else iteration
        if iteration is not None and not first <= iteration <= last:
            raise ValueError(
                f"--save-activations-step {iteration}: this run has steps {first} to {last}; "
                f"name one of them"
            )
        self._folder = step_folder(folder, self._wanted)
        # Files of another layout would stand between the new ones.
        if self._folder.exists():
            raise ValueError(
                f"--save-activations {folder} has step {self._wanted} already: name another "
                f"folder, or remove {self._folder}"
            )

    def next_step(self) -> StepData:
        """Draw the next step."""
        step = self._source.next_step()
        if self._next == self._wanted:
            for tap in _taps(self._engine.model):
                tap.open(step, self._folder, self._engine.topology.rank)
        self._next += 1
        return step

    def state(self) -> dict[int, Any]:
        """As of the source."""
        return self._source.state()

    def restore(self, lanes: Mapping[int, Any]) -> None:
        """As of the source."""
        self._source.restore(lanes)


class _Tap:
    """Saves what passes a point of this rank, microbatch by microbatch, then lets go of it.

    Args:
        point: Of `saved_activations.POINTS`.
        module: That the tensor goes into or comes out of.
        argument: The keyword argument that it is; None for the module's output.
        parts: What this rank holds of a microbatch's samples, as rows of the tensor, flattened to
            [rows, columns].
        columns: First column that this rank has, and the columns of all ranks.
    """

    def __init__(
        self,
        point: str,
        module: nn.Module,
        *,
        argument: str | None,
        parts: Callable[[Microbatch], Iterable[Part]],
        columns: tuple[int, int],
    ) -> None:
        self._point, self._module, self._argument = point, module, argument
        self._parts, self._columns = parts, columns
        self._waiting: deque[Microbatch] = deque()
        self._handle: RemovableHandle | None = None

    def open(self, step: StepData, folder: Path, rank: int) -> None:
        """Save a step's microbatches, which come in order."""
        self._waiting.extend(
            m for m in step.microbatches if self._point != PROJECTOR or m.images is not None
        )
        self._folder, self._rank = folder, rank
        if not self._waiting:
            return
        if self._argument is None:
            self._handle = self._module.register_forward_hook(
                lambda _module, _args, output: self._take(output)
            )
        else:
            name = self._argument
            self._handle = self._module.register_forward_pre_hook(
                lambda _module, _args, kwargs: self._take(kwargs[name]), with_kwargs=True
            )

    def _take(self, value: Any) -> None:
        # Linear layers of megatron-core return their bias too.
        tensor: Tensor = value[0] if isinstance(value, tuple) else value
        microbatch = self._waiting.popleft()
        if not self._waiting:
            assert self._handle is not None
            self._handle.remove()
        self._write(microbatch, tensor.detach().flatten(0, -2).cpu())

    def _write(self, microbatch: Microbatch, tensor: Tensor) -> None:
        first, width = self._columns
        samples, tensors = [], {}
        for part in self._parts(microbatch):
            if not len(part.rows):
                continue
            key = microbatch.keys[part.lane][part.index]
            # A small dataset may have a sample twice in a microbatch.
            name = f"{key} (lane {part.lane}, sample {part.index})"
            tensors[name] = tensor.index_select(0, part.rows)
            tensors[name + POSITIONS] = part.positions
            samples.append(
                SavedSample(
                    name=name,
                    key=key,
                    lane=part.lane,
                    microbatch=microbatch.index,
                    index=part.index,
                    size=part.size,
                )
            )
        about = SavedFile(
            point=self._point, first_column=first, width=width, samples=tuple(samples)
        )
        folder = self._folder / self._point.replace(" ", "-")
        path = folder / f"rank-{self._rank:05}-microbatch-{microbatch.index:05}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, unfinished, {METADATA: about.to_json()})
            os.replace(unfinished, path)
        except (OSError, SafetensorError) as error:
            raise RuntimeError(
                f"cannot write activations to --save-activations {path}: {error}; free space "
                f"there, or train without it"
            ) from error


def _taps(model: MimoModel) -> Iterator[_Tap]:
    """The points that this rank saves: of tensors that ranks share, the first of them does."""
    if model.encoder is not None:
        groups, module = model.encoder.groups, model.encoder.module
        if isinstance(module.projector, nn.Module) and groups.place.tp == 0:
            yield _Tap(
                PROJECTOR,
                module.projector,
                argument=None,
                parts=partial(row_parts, encoder_rank=groups.place.dp),
                columns=(0, model.row_width),
            )
    if model.language is None:
        return
    groups, sharding = model.language.groups, model.sharding
    place, language = groups.place, model.language.module.model
    if groups.is_first_stage and (place.tp == 0 or sharding.sequence_parallel):
        shard = sharding.shard(cp_rank=place.cp, tp_rank=place.tp)
        yield _Tap(
            EMBEDDINGS,
            language,
            argument="decoder_input",
            parts=partial(token_parts, lane=place.dp, held=positions_in(sharding.intervals(shard))),
            columns=(0, model.row_width),
        )
    if groups.is_last_stage:
        columns = language.output_layer.output_size_per_partition
        yield _Tap(
            LOGITS,
            language.output_layer,
            argument=None,
            parts=partial(
                token_parts, lane=place.dp, held=positions_in(sharding.cp_intervals(place.cp))
            ),
            columns=(place.tp * columns, groups.spec.tp * columns),
        )


def _starts(microbatch: Microbatch, lane: int) -> Sequence[tuple[int, int]]:
    """Where a lane's samples begin; without packing each has a sequence of its own."""
    return microbatch.starts.get(lane) or [(i, 0) for i in range(len(microbatch.keys[lane]))]


def _sample_at(microbatch: Microbatch, lane: int, place: tuple[int, int]) -> tuple[int, int]:
    """The sample that a (sequence, position) is part of: its index, and its first position."""
    starts = _starts(microbatch, lane)
    index = bisect_right(starts, place) - 1
    return index, starts[index][1]
