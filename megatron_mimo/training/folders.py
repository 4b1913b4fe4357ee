"""Folders that a run will write to, tried before anything is built."""

from collections.abc import Iterator
from pathlib import Path

from megatron_mimo.config.resolve import Resolved
from megatron_mimo.runtime import RuntimeContext
from megatron_mimo.runtime.output import require_folder


def require_folders(resolved: Resolved, context: RuntimeContext) -> None:
    """Create every folder that ranks of this machine will write to, and write to it.

    A folder that turns out read-only when the first trace or checkpoint is due costs the run.
    --tensorboard-dir is tried by the rank that logs.

    Raises:
        ValueError: A folder cannot be written to; the message has its flag.
    """
    for flag, folder in _folders(resolved, context):
        require_folder(flag, Path(folder))


def _folders(resolved: Resolved, context: RuntimeContext) -> Iterator[tuple[str, str | Path]]:
    """Flag and folder of what this rank tries: one rank of each machine does."""
    if context.local_rank != 0:
        return
    if resolved.save is not None:
        yield "--save", resolved.save.folder
    if resolved.readers.save is not None:
        yield "--dataloader-save", resolved.readers.folder
    watch = resolved.watch
    if watch.save_activations is not None:
        yield "--save-activations", watch.save_activations
    if watch.traces is not None:
        yield "--timeline-dir", watch.traces.folder
