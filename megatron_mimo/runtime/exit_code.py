"""How a process ended, in words."""

import signal


def how_it_ended(code: int) -> str:
    """The end of a process as the rest of a sentence about it.

    Args:
        code: Exit code, negative for the number of a signal.
    """
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # Real-time signals have no names.
        return f"was killed by signal {-code}"
