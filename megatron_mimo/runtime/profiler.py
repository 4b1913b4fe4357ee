"""torch's profiler over some steps."""

import errno
import os
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from megatron_mimo.runtime.device import Device


class StepProfiler:
    """Profiles this rank from its construction to `stop`.

    Args:
        device: Device on which the rank computes.
        path: Path to the Chrome trace to write; its folder exists.
    """

    def __init__(self, device: Device, path: Path) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._path = path
        self._profile = profile(activities=activities)
        self._profile.start()

    def stop(self) -> None:
        """Stop, and write the trace.

        Raises:
            OSError: The trace cannot be written.
        """
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._path))
        # It does not say so when a disk is full.
        with self._path.open("rb") as trace:
            trace.seek(0, os.SEEK_END)
            trace.seek(max(0, trace.tell() - 16))
            if not trace.read().rstrip().endswith(b"}"):
                raise OSError(errno.EIO, "the file is cut off", str(self._path))
