"""Save the tensors at three points of the model in one step, for `parity --tensors`.

Hooks on the modules save them. The hooks are added before the step and removed after its last
microbatch.
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

from megatron_mimo.data.loader.batch import Microbatch, ResumableLoader, StepData
from megatron_mimo.model.mimo import MimoModel
from megatron_mimo.modules.language.merge import positions_in
from megatron_mimo.optim.train_state import TrainState
from megatron_mimo.watch.saved_activations import (
    EMBEDDINGS,
    LOGITS,
    METADATA,
    POSITIONS,
    PROJECTOR,
    SavedFile,
    SavedSample,
    step_folder,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The positions of one sample that a rank holds at a point.

    Attributes:
        lane: Lane that reads the sample.
        index: Index among the lane's samples of the microbatch.
        size: Number of positions of the whole sample.
        positions: Positions that the rank holds, int64 [n], counted from the first of the sample.
        rows: Rows of the rank's tensor in which they are, int64 [n].
    """

    lane: int
    index: int
    size: int
    positions: Tensor
    rows: Tensor


def row_parts(microbatch: Microbatch, module: str, source_rank: int) -> Iterator[Part]:
    """Samples whose rows a replica of a source computes; positions are those of its tokens.

    Args:
        microbatch: Microbatch with the manifest of the lanes that the rank serves.
        module: Name of the source.
        source_rank: Data-parallel rank of the source.
    """
    held: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    sizes: dict[tuple[int, int], int] = {}
    offset = 0
    for entry in (entry for entry in microbatch.manifest if entry.module == module):
        index, start = _sample_at(microbatch, entry.lane, (entry.sequence, entry.start))
        sample = entry.lane, index
        sizes[sample] = sizes.get(sample, 0) + entry.rows
        if entry.source_rank == source_rank:
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


def token_parts(
    microbatch: Microbatch, lane: int, held_of: Callable[[tuple[int, ...]], Tensor]
) -> Iterator[Part]:
    """Tokens that a rank has of the samples of a lane; padding after documents is left out.

    Args:
        microbatch: Microbatch with the text of the lane.
        lane: Lane of the rank.
        held_of: Function that returns the positions of a sequence that the rank has, int64 [s],
            ascending, from the documents of a packed one.

    Yields:
        Parts whose `rows` index a tensor [s * B], which is [s, B, ...] without its last axis.
    """
    text = microbatch.text
    assert text is not None
    batch, length = text.input_ids.shape
    held = held_of(text.lengths or ())
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


class ActivationTap(ResumableLoader):
    """Passes steps on, and saves the activations of one of them while it runs.

    Args:
        source: Loader of the steps.
        state: The modules of this rank.
        folder: Folder in which a folder of the step is created.
        first: Iteration of the next step of the source.
        last: Last iteration of training.
        iteration: Iteration whose activations are saved; None for the first.

    Raises:
        ValueError: The iteration is outside the run, or has been saved in the folder before.
    """

    def __init__(
        self,
        source: ResumableLoader,
        state: TrainState,
        folder: str,
        *,
        first: int,
        last: int,
        iteration: int | None,
    ) -> None:
        self._source, self._train_state = source, state
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
        """Read the next step."""
        step = self._source.next_step()
        if self._next == self._wanted:
            topology = self._train_state.topology
            is_only_source = len(topology.layout.sources) == 1
            for tap in _taps(self._train_state.model, is_only_source=is_only_source):
                tap.open(step, self._folder, topology.rank)
        self._next += 1
        return step

    def state(self) -> dict[int, Any]:
        """State of the source, by lane."""
        return self._source.state()

    def restore(self, lanes: Mapping[int, Any]) -> None:
        """Restore the state of the source."""
        self._source.restore(lanes)


class _Tap:
    """Saves the tensors of a point of this rank, microbatch by microbatch, then drops them.

    Args:
        point: Name of the point, one of `saved_activations.POINTS`.
        module: Module whose input or output the tensor is.
        argument: Name of the keyword argument that is saved; None for the module's output.
        parts: Function that gives the parts of a microbatch's samples that this rank holds, as rows
            of the tensor flattened to [rows, columns].
        columns: First column that this rank has, and the number of columns of all ranks.
        runs: Whether the module runs on a microbatch.
    """

    def __init__(
        self,
        point: str,
        module: nn.Module,
        *,
        argument: str | None,
        parts: Callable[[Microbatch], Iterable[Part]],
        columns: tuple[int, int],
        runs: Callable[[Microbatch], bool] = lambda _: True,
    ) -> None:
        self._runs = runs
        self._point, self._module, self._argument = point, module, argument
        self._parts, self._columns = parts, columns
        self._waiting: deque[Microbatch] = deque()
        self._handle: RemovableHandle | None = None

    def open(self, step: StepData, folder: Path, rank: int) -> None:
        """Begin to save a step; its microbatches come in order."""
        self._waiting.extend(m for m in step.microbatches if self._runs(m))
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


def _taps(model: MimoModel, *, is_only_source: bool) -> Iterator[_Tap]:
    """Points that this rank saves; of tensors that several ranks hold, the first one saves."""
    sources = {name: one for name, one in model.modules.items() if name != model.target_name}
    for name, replica in sources.items():
        place = replica.groups.place
        if replica.groups.is_last_stage and (place.tp, place.cp) == (0, 0):
            yield _Tap(
                PROJECTOR if is_only_source else f"{PROJECTOR} of {name}",
                replica.module,
                argument=None,
                parts=partial(row_parts, module=name, source_rank=place.dp),
                columns=(0, model.row_width),
                runs=partial(_has_items, module=name),
            )
    if model.target is None:
        return
    groups, sharding = model.target.groups, model.sharding
    place, language = groups.place, model.target.module.model
    if groups.is_first_stage and (place.tp == 0 or sharding.sequence_parallel):
        shard = sharding.shard(cp_rank=place.cp, tp_rank=place.tp)
        yield _Tap(
            EMBEDDINGS,
            language,
            argument="decoder_input",
            parts=partial(
                token_parts,
                lane=place.dp,
                held_of=lambda documents: positions_in(sharding.of(documents).intervals(shard)),
            ),
            columns=(0, model.row_width),
        )
    if groups.is_last_stage:
        columns = language.output_layer.output_size_per_partition
        yield _Tap(
            LOGITS,
            language.output_layer,
            argument=None,
            parts=partial(
                token_parts,
                lane=place.dp,
                held_of=lambda documents: positions_in(
                    sharding.of(documents).cp_intervals(place.cp)
                ),
            ),
            columns=(place.tp * columns, groups.spec.tp * columns),
        )


def _has_items(microbatch: Microbatch, module: str) -> bool:
    return module in microbatch.inputs


def _starts(microbatch: Microbatch, lane: int) -> Sequence[tuple[int, int]]:
    """Sequence and position where each sample of a lane begins; a sequence each without packing."""
    return microbatch.starts.get(lane) or [(i, 0) for i in range(len(microbatch.keys[lane]))]


def _sample_at(microbatch: Microbatch, lane: int, place: tuple[int, int]) -> tuple[int, int]:
    """Sample that a (sequence, position) belongs to: its index, and its first position."""
    starts = _starts(microbatch, lane)
    index = bisect_right(starts, place) - 1
    return index, starts[index][1]
