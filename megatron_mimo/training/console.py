"""What ranks write to the screen."""

import logging
import sys

_PACKAGE = "megatron_mimo"


def configure_logging(role: str, rank: int, *, is_logging_rank: bool) -> None:
    """Send this package's log to stderr: everything from the logging rank, else warnings only.

    Rank and role come from the formatter, so that no message needs to name them.

    Args:
        role: In words: "encoder dp 0".
        rank: Global rank.
        is_logging_rank: Whether this rank reports on the run.
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
