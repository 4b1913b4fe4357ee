"""The weights beside adapters, which a checkpoint of adapters leaves out: read, and recognised."""

import logging
import math
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.checkpoint.collectives import check_whole, compare, listed, on_first_rank
from megatron_mimo.checkpoint.saved_run import read_common
from megatron_mimo.checkpoint.sharded_files import read
from megatron_mimo.checkpoint.start import weights_of
from megatron_mimo.checkpoint.tensors import Replica, base_reads, base_tensors
from megatron_mimo.modules.lora.config import Lora
from megatron_mimo.weights.torch_dist import describe

logger = logging.getLogger(__name__)
FLAG = "--load-base"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def load_base(
    replicas: Iterable[Replica], path: Path, control: dist.ProcessGroup, *, trust: bool = False
) -> None:
    """Load all weights but those of adapters from a checkpoint of a run without adapters.

    Collective. Every name and shape is checked before a weight changes.

    Args:
        replicas: Modules on this rank.
        path: Path to a folder of checkpoints, or to the folder of one iteration.
        control: Group of the ranks.
        trust: Whether files may run code.

    Raises:
        ValueError: There is no checkpoint, it is damaged, or it does not hold the model; the
            message lists what is missing.
    """
    start = time.perf_counter()
    folder: Path = on_first_rank(control, lambda: weights_of(path, FLAG))
    check_whole(folder, control)
    if "lora" in read_common(folder, trust=trust):
        raise ValueError(
            f"{FLAG} {folder} is a checkpoint of adapters: expected one of a run without "
            f"--lora-rank; --load continues with adapters"
        )
    stored = describe(folder, trust=trust)
    wanted = [part for replica in replicas for part in base_reads(replica)]
    faults, _ = compare(wanted, stored.tensors, control)
    if faults:
        raise ValueError(
            f"{FLAG} {folder} does not hold what this model asks for: {listed(faults, '; ')}"
        )
    read(wanted, stored, trust=trust)
    logger.info("loaded the weights of %s [ %.1f s ]", folder, time.perf_counter() - start)


def describe_adapters(
    lora: Lora, replicas: Iterable[Replica], control: dist.ProcessGroup
) -> dict[str, Any]:
    """What a checkpoint says of its adapters, and of the weights beside them. Collective.

    The weights are recognised by a sum over the bits of all of them, the same in every layout.

    Args:
        lora: Adapters of the run.
        replicas: Modules on this rank.
        control: Group of the ranks.
    """
    total = sum(_digest(replica) for replica in replicas) % 2**32
    message = torch.tensor(total)
    dist.all_reduce(message, group=control)
    return {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "rslora": lora.rslora,
        "targets": {part: sorted(layers) for part, layers in lora.targets.items()},
        "base": int(message) % 2**32,
    }


def require_same(
    stored: Mapping[str, Any] | None, expected: Mapping[str, Any] | None, folder: Path
) -> None:
    """Refuse a checkpoint of other adapters, or of adapters of other weights.

    Args:
        stored: What the checkpoint says of its adapters; None where it has none.
        expected: What this run would say; None where it has none.
        folder: Folder of the checkpoint.

    Raises:
        ValueError: They differ; the message names the flag.
    """
    if stored is None and expected is not None:
        raise ValueError(
            f"{folder} is a checkpoint of a run without adapters: name it with {FLAG}, and leave "
            f"--load to the checkpoints of this run"
        )
    if stored is not None and expected is None:
        raise ValueError(
            f"{folder} is a checkpoint of adapters: give --lora-rank {stored['rank']} and the "
            f"other flags of its run; `megatron-mimo checkpoint convert` merges it into a folder"
        )
    if stored is None or expected is None:
        return
    for field in ("rank", "alpha", "rslora", "targets"):
        if stored[field] != expected[field]:
            raise ValueError(
                f"{folder} has adapters with {field} {stored[field]}, this run with "
                f"{expected[field]}: give the same --lora-{field}"
            )
    if stored["base"] != expected["base"]:
        raise ValueError(
            f"{folder} has adapters of other weights than those that this run began with: give "
            f"the same --load-hf, {FLAG} or --load-nemotron-checkpoint, or without them the same "
            f"--seed, and the same precision"
        )


def _digest(replica: Replica) -> int:
    """Sum over the bits of the weights that a checkpoint leaves out, of those held once."""
    total = 0
    for local in base_tensors(replica):
        if not local.name.startswith(replica.left_out):
            continue
        flat = local.data.reshape(-1)
        for box in local.stored:
            if box.is_main and box.replica == 0:
                total += _bits(flat[box.start :][: math.prod(box.shape)], box.key)
    return total


def _bits(flat: Tensor, key: str) -> int:
    bits = flat.view(_BITS[flat.element_size()])
    return int(bits.sum(dtype=torch.int64)) * (zlib.crc32(key.encode()) | 1) % 2**32
