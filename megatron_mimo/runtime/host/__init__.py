"""megatron-core on a machine without a GPU.

megatron-core assumes CUDA in many small ways: `torch.cuda.current_device()` as a device, literal
`device="cuda"`, parameter types compared with "torch.cuda.FloatTensor", streams and events, the
GPU's random generator. This package answers each of them with the host, once per process, before
megatron-core is imported (it binds names at import).

In a dry run torch's "meta" device answers in the place of the host (`runtime.paper`).

- `cuda_namespace`: stand-ins in `torch.cuda`: devices, streams, events, random state.
- `tensors`: tensor factories and `Tensor` methods that are given a CUDA device.
- `megatron_core`: the few places in megatron-core itself.

Plain functions are replaced rather than a `TorchFunctionMode` entered: torch leaves such a mode
during backward, and other threads never enter it.

Nothing here runs where the device is a GPU. `torch.cuda.is_available()` stays False on a host.
"""

from megatron_mimo.runtime.host.install import host_adaptation_installed, install_host_adaptation

__all__ = ["host_adaptation_installed", "install_host_adaptation"]
