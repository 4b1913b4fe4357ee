"""Checkpoints of earlier versions load: what is stored keeps its names, shapes and dtypes.

`stored_tensors.txt` lists the tensors of runs from before modules had names: preset, key, shape and
dtype. A preset whose encoder was frozen has no optimizer state of it.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

LISTED = Path(__file__).with_name("stored_tensors.txt").read_text(encoding="utf-8").splitlines()


def stored(provider: str, frozen: tuple[str, ...]) -> list[str]:
    """What one rank would store of a preset, as the list has it."""
    import torch.distributed as dist

    from megatron_mimo.checkpoint.tensors import optimizer_tensors, writes
    from megatron_mimo.model.mimo import build_model
    from megatron_mimo.optim.config import AdamConfig
    from megatron_mimo.optim.mimo_optimizer import MimoOptimizer
    from megatron_mimo.runtime import Device
    from megatron_mimo.topology.groups import build_topology
    from tests.integration.engines import layout, small_parts

    topology = build_topology(layout({}, {}))
    parts = small_parts(provider=provider, overrides=(), freeze=frozenset(frozen))
    model = build_model(*parts, topology, Device("cpu"))
    optimizer = MimoOptimizer(model, AdamConfig(), ("encoder", "llm"), dist.group.WORLD)
    states = optimizer.param_states()
    return sorted(
        {
            f"{provider} {tensor.key} {'x'.join(map(str, tensor.global_shape)) or '-'} "
            f"{str(tensor.dtype).removeprefix('torch.')}"
            for replica in model.replicas
            for tensor in [
                *writes(replica, states),
                *optimizer_tensors(replica, states, reading=False),
            ]
        }
    )


@pytest.mark.parametrize(
    ("provider", "frozen"), [("mock", ()), ("nemotron-moe-vlm-tiny", ("vision",))]
)
def test_tensors_keep_their_names(
    provider: str, frozen: tuple[str, ...], run_ranks: Callable[..., list]
) -> None:
    (found,) = run_ranks(1, stored, provider, frozen)
    assert found == sorted(line for line in LISTED if line.startswith(f"{provider} "))
