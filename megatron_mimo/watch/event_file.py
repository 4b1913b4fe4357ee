"""TensorBoard event files that are written by the calling thread.

TensorBoard's own writer writes in a thread: a full disk then shows as a traceback of that thread,
and to the caller only at a later event.
"""

import io
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_mimo.runtime.output import LastingFile
from megatron_mimo.watch.tags import VS_SAMPLES

# TensorBoard finds event files by the first words of the name.
EVENTS, UNDONE = "events.out.tfevents.", "events.out.undone."
_LENGTH, _CHECKSUM = struct.Struct("<Q"), 4  # Around the bytes of each event.


class EventFile(LastingFile):
    """Appends scalars to a new event file.

    Args:
        folder: Folder that exists; TensorBoard is pointed to it or to a folder above.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        now = time.time()
        # TensorBoard orders event files by name.
        name = f"{EVENTS}{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
        super().__init__(
            folder / name, head=_record(Event(wall_time=now, file_version="brain.Event:2"))
        )

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Write the values of one step by tag; they are on disk when this returns.

        Raises:
            OSError: The file cannot be written.
        """
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self.append(_record(Event(wall_time=time.time(), step=step, summary=Summary(value=values))))


def undo_events(folder: Path, iteration: int, samples: int) -> int:
    """Take events out of a folder's files that loading a checkpoint has undone.

    TensorBoard would show their steps twice. Its own mark for a restart takes out every event with
    a later step, those over samples too, whose steps are larger. The whole files stay under a name
    that TensorBoard does not read.

    Args:
        folder: Folder of event files.
        iteration: Iteration from which the run continues.
        samples: Number of samples from which it continues.

    Returns:
        Number of events that were taken out.

    Raises:
        OSError: A file cannot be read or written.
    """
    number = 0
    for path in sorted(folder.glob(f"{EVENTS}*")):
        content = path.read_bytes()
        records = list(_records(content))
        kept = [record for record, event in records if not _is_undone(event, iteration, samples)]
        if len(kept) == len(records):
            continue
        number += len(records) - len(kept)
        whole = path.with_name(path.name.replace(EVENTS, UNDONE))
        unfinished = whole.with_suffix(".unfinished")
        unfinished.write_bytes(b"".join(kept))
        if not whole.exists():
            os.link(path, whole)
        os.replace(unfinished, path)
    return number


def _is_undone(event: Event, iteration: int, samples: int) -> bool:
    tags = [value.tag for value in event.summary.value]
    over_samples = bool(tags) and all(tag.endswith(VS_SAMPLES) for tag in tags)
    return bool(event.step > (samples if over_samples else iteration))


def _records(content: bytes) -> Iterator[tuple[bytes, Event]]:
    """Each event with its bytes, up to where the file is cut off or damaged."""
    start = 0
    while start + _LENGTH.size <= len(content):
        (size,) = _LENGTH.unpack_from(content, start)
        first = start + _LENGTH.size + _CHECKSUM
        end = first + size + _CHECKSUM
        if end > len(content):
            return
        try:
            event = Event.FromString(content[first : first + size])
        # Protobuf's error, whose package we do not depend on by ourselves.
        except Exception:
            return
        yield content[start:end], event
        start = end


def _record(event: Event) -> bytes:
    content = io.BytesIO()
    RecordWriter(content).write(event.SerializeToString())
    return content.getvalue()
