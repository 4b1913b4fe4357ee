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
    from tests.fused import install as fused
    from tests.fused.packages import VARIABLE as FUSED
    from tests.interpreted import install as interpreted
    from tests.interpreted.packages import VARIABLE as INTERPRETED

    if version := os.environ.get(FUSED):
        fused.install(version)
    elif version := os.environ.get(INTERPRETED):
        interpreted.install(version)
    else:
        from megatron_mimo.runtime import prepare_megatron_core, resolve_device

        prepare_megatron_core(resolve_device("cpu"))
    # What tests that train import; a worker would pay a second for it, and many workers are made.
    from megatron.core.models import gpt, hybrid  # noqa: F401

    import megatron_mimo.checkpoint.checkpointer
    import megatron_mimo.config.presets
    import megatron_mimo.data
    import megatron_mimo.training.runner
    import megatron_mimo.training.step  # noqa: F401


try:
    _rewrite_asserts()
    _warm_up()
except Exception:
    problem = traceback.format_exc()
