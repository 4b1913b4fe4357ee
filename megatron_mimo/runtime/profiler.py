"""torch's profiler over some steps."""

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from megatron_mimo.runtime.device import Device


class StepProfiler:
    """Profiles this rank from its making to `stop`.

    Args:
        device: Where the rank computes.
        path: Chrome trace to write; its folder exists.
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
            OSError: It cannot be written.
        """
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._path))
