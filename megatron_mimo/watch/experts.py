"""Balance of the load of each layer's experts, and the load-balancing loss."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.modules.adapter import Experts
from megatron_mimo.modules.families import adapter_of

if TYPE_CHECKING:
    from megatron_mimo.model.mimo import MimoModel


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """Load of one E layer in one step.

    Attributes:
        layer: Number of the layer, from 1, among all layers.
        tokens: Number of tokens of each expert over the global batch; padding is none.
        balance_loss: Load-balancing loss before its coefficient, mean over tokens.
    """

    layer: int
    tokens: tuple[int, ...]
    balance_loss: float

    @property
    def max_over_mean(self) -> float:
        """Largest load of an expert over the mean load; 1 is even."""
        total = sum(self.tokens)
        return max(self.tokens) * len(self.tokens) / total if total else 1.0


def gather_load(model: "MimoModel") -> Tensor | None:
    """Tokens of every expert and balance losses of a step, summed over the language model's grid.

    One small reduction and no wait for the device. Call it after the step's last backward and
    before its gradients are finalised, which clears the counts; those of a frozen language model,
    which has no gradients to finalise, are cleared here.

    Args:
        model: The modules of this rank.

    Returns:
        Numbers of tokens, and last the balance loss, float64 [E layers, experts + 1]; None on ranks
        that do not hold the language model, for a model without experts, or with those of
        transformers, whose routers do not count.
    """
    language = model.target
    if language is None:
        return None
    experts, groups = adapter_of(language.config).experts(language.config), language.groups
    decoder: Any = getattr(language.module.model, "decoder", None)
    if experts is None or decoder is None:
        return None
    numbers = experts.layers
    found = torch.zeros(len(numbers), experts.number + 1, dtype=torch.float64, device=model.device)
    # megatron-core's, which routers record into.
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from megatron_mimo.kernels.router import BALANCE_LOSS

    tracker = get_moe_metrics_tracker()
    recorded = tracker.metrics.get(BALANCE_LOSS)
    for layer in decoder.layers:
        if not hasattr(layer, "mlp") or not hasattr(layer.mlp, "router"):
            continue
        row = found[numbers.index(layer.layer_number)]
        counts = layer.mlp.router.local_tokens_per_expert
        row[:-1] = counts
        if language.ddp is None:
            counts.zero_()
        if recorded is not None:
            row[-1] = recorded.values[layer.layer_number - 1]
    tracker.clear()
    dist.all_reduce(found, group=groups.pg_collection.intra_dist_opt)
    # The router sums over tokens, each of which was sent to so many experts.
    found[:, -1] *= experts.per_token / found[:, :-1].sum(dim=-1).clamp(min=1)
    return found


def read_load(found: Tensor, experts: Experts) -> tuple[LayerLoad, ...]:
    """Result of `gather_load`, float64 [E layers, experts + 1], by layer; waits for the device."""
    return tuple(
        LayerLoad(number, tuple(int(count) for count in row[:-1]), row[-1])
        for number, row in zip(experts.layers, found.tolist(), strict=True)
    )
