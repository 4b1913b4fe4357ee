"""What Linux reports about another process."""

import os
import sys
from pathlib import Path

_EXIT_CODE = 52 - 3  # among the fields of /proc/PID/stat that follow the name


def open_process(pid: int) -> int | None:
    """Descriptor that becomes readable when the process ends; needs Linux 5.3 or newer."""
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def state_and_parent(pid: int) -> tuple[str, int]:
    """State letter and parent of a process, on Linux; ("", 0) elsewhere and if it is gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", 0
    state, parent = status[status.rindex(")") + 1 :].split()[:2]
    return state, int(parent)


def exit_code(pid: int) -> int | None:
    """Exit code of a process that its parent has not waited for yet; negative for a signal.

    None if the process is gone, if it ended with 0, if it may not be queried, and on systems other
    than Linux: proc(5) shows 0 in these cases.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = status[status.rindex(")") + 1 :].split()
    exited = fields[0] == "Z" and len(fields) > _EXIT_CODE and fields[_EXIT_CODE] != "0"
    return os.waitstatus_to_exitcode(int(fields[_EXIT_CODE])) if exited else None
