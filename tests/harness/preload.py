"""Imported once by the parent of all workers, which are then forked from it.

Importing torch and megatron-core takes seconds; a fork takes milliseconds. Nothing here may
start a thread, since threads do not survive a fork.
"""

import os
import sys
import traceback

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"

problem: str | None = None
"""Why the workers cannot start: a traceback, or None."""


def _rewrite_asserts() -> None:
    """Let `assert a == b` in a test module show its values in a rank's traceback too."""
    from _pytest.assertion import install_importhook
    from _pytest.config import get_config

    install_importhook(get_config())


def _warm_up() -> None:
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    from megatron_mimo.runtime import prepare_engine, resolve_device

    prepare_engine(resolve_device("cpu"))
    # What tests that train import; a worker would pay a second for it, and many workers are made.
    from megatron.core.models import gpt, hybrid  # noqa: F401

    import megatron_mimo.checkpoint.checkpointer
    import megatron_mimo.data
    import megatron_mimo.presets
    import megatron_mimo.training.engine
    import megatron_mimo.training.step  # noqa: F401


try:
    _rewrite_asserts()
    _warm_up()
except Exception:
    problem = traceback.format_exc()
