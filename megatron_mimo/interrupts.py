"""Ctrl-C while modules are imported, which takes seconds: no traceback, and exit code 130.

Import it before anything else. A KeyboardInterrupt would come out in the middle of somebody's
imports, or be taken for a missing module there. Nothing is lost by an end at once.
"""

import os
import signal
import threading
from types import FrameType

EXIT_INTERRUPTED = 130


def quiet_imports() -> None:
    """Handle SIGINT, unless somebody does already. It is a KeyboardInterrupt outside of imports."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def end_quiet_imports() -> None:
    """Handle SIGINT as Python does: an end is no longer without consequences."""
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(_: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(EXIT_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


quiet_imports()
