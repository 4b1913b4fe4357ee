"""A TensorBoard event file, written where it is called.

TensorBoard's own writer writes in a thread: a full disk then shows as that thread's traceback, and
to the caller at some later event.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """Appends scalars to a new event file.

    Args:
        folder: Exists; TensorBoard is pointed to it or to a folder above.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        now = time.time()
        # TensorBoard finds event files by the first words of the name, and orders them by it.
        name = f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._append(Event(wall_time=now, file_version="brain.Event:2"))
        self._file.flush()

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Write values of one step, by tag; they are on disk when this returns.

        Raises:
            OSError: The file cannot be written.
        """
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
