"""How evenly the experts of each layer are loaded, and the loss that evens them out."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.language.config import HybridConfig

if TYPE_CHECKING:
    from megatron_mimo.model.mimo import MimoModel

_BALANCE_LOSS = "seq_load_balancing_loss"


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """One E layer in one step.

    Attributes:
        layer: Its number, from 1, among all layers.
        tokens: Tokens that each expert took, over the global batch.
        balance_loss: Load-balancing loss before its coefficient, mean over sequences.
    """

    layer: int
    tokens: tuple[int, ...]
    balance_loss: float

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert by that of the mean one; 1 is even."""
        total = sum(self.tokens)
        return max(self.tokens) * len(self.tokens) / total if total else 1.0


def gather_load(model: "MimoModel", num_microbatches: int) -> Tensor | None:
    """Tokens of every expert and balance losses of a step, summed over the language model's grid.

    One small reduction and no wait for the device. Call it behind the step's last backward and
    before its gradients are finalised, which clears the counts.

    Args:
        model: The modules of this rank.
        num_microbatches: Of a lane.

    Returns:
        float64 [E layers, experts + 1], the balance loss last; None on ranks that do not hold the
        language model, or for a model without experts.
    """
    language = model.language
    if language is None or not isinstance(language.module.architecture, HybridConfig):
        return None
    config, groups = language.module.architecture, language.groups
    numbers = [number for number, letter in enumerate(config.layers, 1) if letter == "E"]
    if not numbers:
        return None
    found = torch.zeros(
        len(numbers), config.num_moe_experts + 1, dtype=torch.float64, device=model.device
    )
    # megatron-core's, which routers record into.
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    tracker = get_moe_metrics_tracker()
    recorded = tracker.metrics.get(_BALANCE_LOSS)
    for layer in language.module.model.decoder.layers:
        if not hasattr(layer, "mlp") or not hasattr(layer.mlp, "router"):
            continue
        row = found[numbers.index(layer.layer_number)]
        row[:-1] = layer.mlp.router.local_tokens_per_expert
        if recorded is not None:
            row[-1] = recorded.values[layer.layer_number - 1]
    tracker.clear()
    # Tensor- and context-parallel ranks hold parts of a sequence's loss, replicas whole ones.
    found[:, -1] /= num_microbatches * groups.spec.dp
    dist.all_reduce(found, group=groups.pg_collection.intra_dist_opt)
    return found


def read_load(found: Tensor, config: HybridConfig) -> tuple[LayerLoad, ...]:
    """What `gather_load` found, layer by layer; waits for the device."""
    numbers = (number for number, letter in enumerate(config.layers, 1) if letter == "E")
    return tuple(
        LayerLoad(number, tuple(int(count) for count in row[:-1]), row[-1])
        for number, row in zip(numbers, found.tolist(), strict=True)
    )
