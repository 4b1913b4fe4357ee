"""Installation of the host adaptation, once per process."""

import logging
import sys

from megatron_mimo.runtime.device import Device, resolve_device
from megatron_mimo.runtime.host import cuda_namespace, megatron_core, tensors
from megatron_mimo.runtime.host.memory import keep_freed_memory
from megatron_mimo.runtime.quiet import quiet_upstream
from megatron_mimo.runtime.scratch import ensure_global_memory_buffer
from megatron_mimo.runtime.versions import check_imports

logger = logging.getLogger(__name__)

# Patches are process-wide, so is the record that they are in.
_installed: list[Device] = []


def host_adaptation_installed() -> bool:
    """Whether this process runs megatron-core on a host."""
    return bool(_installed)


def install_host_adaptation(device: Device | None = None) -> None:
    """Make megatron-core run on a host. Does nothing for a GPU, or when called again.

    Imports megatron-core, which takes seconds, and creates its scratch buffer.

    Args:
        device: This rank's device; None takes a GPU where there is one. Name a host to run on one
            although the machine has a GPU.

    Raises:
        ValueError: A package that megatron-core imports is broken.
        RuntimeError: megatron-core was imported before this call.
    """
    device = device or resolve_device("auto")
    if _installed or device.type == "cuda":
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before the host adaptation was installed, so it has bound "
            "names that need a GPU: call megatron_mimo.runtime.initialize() (or "
            "install_host_adaptation()) first, and import modules that use megatron.core after it"
        )
    quiet_upstream()
    cuda_namespace.install(device.torch)
    tensors.install(device.torch)
    keep_freed_memory()
    check_imports()
    megatron_core.import_megatron_core()
    ensure_global_memory_buffer()
    _installed.append(device)
    logger.debug("host adaptation installed")
