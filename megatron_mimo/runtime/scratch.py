"""The one piece of megatron-core's global state that every run needs."""


def ensure_global_memory_buffer() -> None:
    """Create the scratch buffer of sequence parallelism; a second call changes nothing.

    It has no public constructor outside `initialize_model_parallel`, which would also build groups.
    """
    from megatron.core import parallel_state

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
