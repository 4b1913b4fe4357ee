"""Filters for upstream messages that users of this trainer cannot act on."""

import logging
import warnings

# Patterns of messages sent through `warnings`.
_WARNINGS = (
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    r"Only transformer-engine",
    r"\w+ is experimental and still under active development",
    r"The following imports from `dynamic_context.py` will be removed",
    r"`torch\.jit\.script",
    r"full scope is deprecated",
    r"When using sequence parallelism it is recommended to set the environment variable",
    # megatron-core calls them; torch renamed them.
    r"`torch\.distributed\.(reduce_scatter|all_gather_into)_tensor` is deprecated",
    r"Could not determine rank from torch.distributed",
    # Of experts, whose tensor-parallel size is one.
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
)

# Logger -> beginnings of messages that it should drop.
_LOG_MESSAGES: dict[str, tuple[str, ...]] = {
    # Hosts have no CUDA runtime, and one random generator for both.
    "torch.utils.cpp_extension": ("No CUDA runtime is found",),
    "megatron.core.tensor_parallel.random": ("CPU RNG state changed within GPU RNG context",),
    "megatron.core.models.gpt.gpt_model": ("GPTModel IS DEPRECATED",),
    "megatron.core.distributed.distributed_data_parallel": (
        "DistributedDataParallel: full_param_layout not provided",
    ),
}


class DropMessages(logging.Filter):
    """Drops records whose message begins with one of the given texts."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to keep the record."""
        return not str(record.msg).startswith(self.beginnings)


def quiet_upstream() -> None:
    """Filter known noise of megatron-core and torch; a second call changes nothing."""
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for name, beginnings in _LOG_MESSAGES.items():
        target = logging.getLogger(name)
        if not any(isinstance(known, DropMessages) for known in target.filters):
            target.addFilter(DropMessages(beginnings))
