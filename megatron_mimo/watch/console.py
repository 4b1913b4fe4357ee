"""Log messages of ranks on the terminal."""

import logging
import sys

_PACKAGE = "megatron_mimo"


def configure_logging(role: str, rank: int, *, is_logging_rank: bool) -> None:
    """Send this package's log to stderr: all of the logging rank, else warnings only.

    The formatter adds rank and role, so that messages do not need to name them.

    Args:
        role: Description of the rank, such as "encoder dp 0".
        rank: Global rank.
        is_logging_rank: Whether this rank reports the progress of the run.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(message)s")
        if is_logging_rank
        else logging.Formatter(f"[rank {rank}: {role}] %(levelname)s: %(message)s")
    )
    package = logging.getLogger(_PACKAGE)
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.INFO if is_logging_rank else logging.WARNING)
