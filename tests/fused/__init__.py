"""Transformer Engine's own Python code on a host, over stand-ins for its compiled kernels.

Its layers, optimizer and names are NVIDIA's; what a GPU would compute, torch computes. So a test on
a machine without a GPU runs the branches of this program that only a GPU would take.

- `packages`: the versions under test, and the folders that `make transformer-engine` puts them in.
- `extension`: a stand-in for the compiled module that the package imports.
- `kernels`, `attention`, `context_parallel`, `cross_entropy`: the kernels that our layers reach, in
  torch.
- `install`: all of it, together with the host adaptation, in a process that nothing else uses.

Tests call ranks that have it through the fixture `run_fused`.
"""
