"""How often a step waits for its device, counted on a machine that has none.

A copy between host and device that blocks, or a number that is read back, makes the host wait for
all work that it has queued. On a host nothing of that shows. So a rank under `counting` pretends:
`places` notes which tensors would be on a GPU, by where they come from, and `count` lists what
would wait, with the line of code. Numbers are computed as ever.

What the count cannot see: waits inside kernels, in the allocator or in NCCL; operators that wait on
a GPU without being named in `count.READS`; branches that only a tensor of a GPU takes (`is_cuda`).
Of Transformer Engine's layers the Python code counts, their stand-in kernels do not. On a GPU
`torch.cuda.set_sync_debug_mode` has the last word.
"""

from tests.waits.count import Wait, counting

__all__ = ["Wait", "counting"]
