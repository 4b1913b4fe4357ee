"""The router of experts: what it balances and counts are tokens, not positions.

Positions without a token of a sample, the padding, go through the experts like all others, and what
becomes of them is never read. They must not pull at the router either: not in the balancing loss,
not in the bias of each expert, not in the loads that are reported.

Letters: s positions of this rank's shard, B sequences, E experts, k experts of a token.
"""

from typing import Any

from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

BALANCE_LOSS = "seq_load_balancing_loss"
_KIND = "seq_aux_loss"


class TokenRouter(TopKRouter):
    """A router whose balancing loss is a sum over tokens, and whose counts leave out padding.

    megatron-core takes a mask of the padding too, but then divides by the mean length of a
    microbatch's sequences, and weighs the part of each rank by that rank's own tokens, so that the
    loss would depend on which ranks hold the padding.

    Args:
        args: Positional arguments of megatron-core's router.
        kwargs: Keyword arguments of megatron-core's router.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.routing_type == _KIND, (
            f"balancing by {self.routing_type}: expected {_KIND}, whose sums are over tokens here"
        )
        assert self.config.moe_z_loss_coeff is None, "its mean would be over a rank's own tokens"
        assert self.calculate_per_token_loss, "gradients are sums, divided once"

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Add the balancing loss of every sequence, once for each of its tokens.

        Of a sequence with n tokens it is E / (k n^2) * sum over experts of (tokens sent to it) *
        (sum of its scores), which is 1 when all is even; times n, so that the sum over sequences,
        divided by the number of tokens, is a mean over tokens.

        Args:
            probs: Weights of the chosen experts, [s * B, E], to which the loss is attached.
            scores_for_aux_loss: Scores of all experts, float32 [s * B, E]; 0 in the padding.
            routing_map: Chosen experts, bool [s * B, E]; False in the padding.
            seq_length: Number of positions of this rank's shard, s.
            bsz: Number of sequences, B.
            with_padding_mask: Whether there is a mask; it has been applied.
        """
        coefficient = self.get_aux_loss_coeff(_KIND)
        if coefficient == 0:
            return probs
        shape = (seq_length, bsz, self.num_experts)
        # Over the ranks that share the sequences; each has the scores of its own positions.
        sent = reduce_from_tensor_model_parallel_region(
            routing_map.view(shape).sum(dim=0), self.tp_cp_group
        )
        tokens = sent.sum(dim=-1) / self.topk
        shares = scores_for_aux_loss.view(shape).sum(dim=0) * sent
        # A sequence of padding alone has no token, and nothing to divide.
        losses = shares.sum(dim=-1) * self.num_experts / (self.topk * tokens.clamp(min=1))
        loss = losses.sum()
        get_moe_metrics_tracker().record(
            BALANCE_LOSS, loss, self.layer_number, self.config.num_layers
        )
        # The optimizer divides all gradients by the number of target tokens.
        attached: Tensor = MoEAuxLossAutoScaler.apply(probs, loss * coefficient)
        return attached

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of each expert.

        Args:
            routing_map: Chosen experts, bool [s * B, E].
            padding_mask: True where there is no token, bool [s * B]; None where all are tokens.
        """
        if padding_mask is not None:
            # megatron-core's own product of the two does not broadcast.
            routing_map = routing_map & ~padding_mask.unsqueeze(-1)
        super()._apply_expert_bias(routing_map)
