"""What every rank must agree on before a step runs: the samples and the number of targets."""

import torch
import torch.distributed as dist

from megatron_mimo.data.batch import StepData
from megatron_mimo.topology import Layout

_ABSENT = torch.iinfo(torch.int64).min


def agree_on_step(
    step: StepData,
    where: str,
    layout: Layout,
    control: dist.ProcessGroup,
    *,
    validate: bool,
) -> int:
    """Spread the target tokens of every lane, and check that its readers drew the same samples.

    One reduction of three integers per lane over the world, on the host: each lane's largest and
    smallest digest and its tokens. It runs before any row moves, because readers that disagree
    would also disagree about how many rows to expect.

    Args:
        step: This rank's data.
        where: Which step this is, for errors: "iteration 7".
        layout: Both grids.
        control: gloo group of the world.
        validate: Compare the digests.

    Returns:
        Number of target tokens in the global batch.

    Raises:
        RuntimeError: The encoder and the language model read other samples for a lane, or the
            global batch has no target token.
    """
    numbers = torch.full((3, layout.num_lanes), _ABSENT, dtype=torch.int64)
    for lane, digest in step.lane_digest.items():
        numbers[0, lane] = digest
        numbers[1, lane] = -digest
        numbers[2, lane] = step.lane_target_tokens[lane]
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=control)
    largest, negated_smallest, tokens = numbers
    parted = torch.nonzero(largest != -negated_smallest).flatten().tolist()
    if validate and parted:
        raise RuntimeError(
            f"{where}: the encoder and the language model read other samples for "
            f"lanes {', '.join(map(str, parted))}: expected the same keys in the same order; "
            f"write both sides' keys with --sample-trace-dir and compare them"
        )
    total = int(tokens.sum())
    if total <= 0:
        raise RuntimeError(
            f"{where}: no target token in the global batch, so its loss has no "
            f"mean: check the answers of the dataset, or raise --global-batch-size"
        )
    return total
