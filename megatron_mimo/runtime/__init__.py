"""Device and process-group backend of a rank, and megatron-core on a GPU or on a host.

Call `initialize` first, before any module that imports megatron-core is imported.
"""

from megatron_mimo.runtime.device import Device, resolve_device
from megatron_mimo.runtime.host import install_host_adaptation
from megatron_mimo.runtime.rng import seed_everything
from megatron_mimo.runtime.setup import RuntimeContext, initialize, prepare_megatron_core, shutdown

__all__ = [
    "Device",
    "RuntimeContext",
    "initialize",
    "install_host_adaptation",
    "prepare_megatron_core",
    "resolve_device",
    "seed_everything",
    "shutdown",
]
