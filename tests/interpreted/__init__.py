"""mamba-ssm's own Triton kernels on a host, run by Triton's interpreter.

The interpreter executes a kernel program by program, with numpy in the place of a GPU: slow, and
exact in what is computed. So the kernels that megatron-core calls on a GPU can be held against our
scan on a machine without one.

- `packages`: the versions under test, and the folders that `make triton-kernels` puts them in.
- `convolution`: a stand-in for the compiled module of causal-conv1d, which is no Triton kernel.
- `install`: all of it, together with the host adaptation, in a process that nothing else uses.

Tests call ranks that have it through the fixture `run_interpreted`.
"""
