"""What Linux tells about another process."""

import os
import sys
from pathlib import Path

_EXIT_CODE = 52 - 3  # among the fields of /proc/PID/stat that follow the name


def open_process(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; Linux 5.3 and newer."""
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
    """How a process ended that its parent has not waited for yet; negative for a signal.

    None if it is gone, on other systems than Linux, and if it ended in order or may not be asked:
    proc(5) shows 0 then.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = status[status.rindex(")") + 1 :].split()
    exited = fields[0] == "Z" and len(fields) > _EXIT_CODE and fields[_EXIT_CODE] != "0"
    return os.waitstatus_to_exitcode(int(fields[_EXIT_CODE])) if exited else None
