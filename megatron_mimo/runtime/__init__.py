"""Device and backend of a rank, and megatron-core on either.

`initialize` first: modules that import megatron-core come after it.
"""

from megatron_mimo.runtime.device import Device, resolve_device
from megatron_mimo.runtime.host import install_host_adaptation
from megatron_mimo.runtime.rng import seed_everything
from megatron_mimo.runtime.setup import RuntimeContext, initialize, prepare_engine, shutdown

__all__ = [
    "Device",
    "RuntimeContext",
    "initialize",
    "install_host_adaptation",
    "prepare_engine",
    "resolve_device",
    "seed_everything",
    "shutdown",
]
