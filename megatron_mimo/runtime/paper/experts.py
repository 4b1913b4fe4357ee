"""Routing of tokens to experts on paper, where no router's choice can be read."""

from typing import Any

import torch
from torch import Tensor


def share_tokens_evenly() -> None:
    """Let megatron-core's dispatcher find that every expert gets the same number of tokens.

    The router itself runs. Only the counts that the dispatcher would read back from the device come
    from a map on the host: the sizes of messages and of experts' products follow from them, by
    megatron-core's own code. A real router's are uneven, and change with every microbatch.
    """
    from megatron.core.transformer.moe import token_dispatcher

    dispatcher: Any = token_dispatcher.MoEAlltoAllTokenDispatcher
    preprocess, gather = (
        dispatcher.preprocess,
        token_dispatcher.gather_from_sequence_parallel_region,
    )

    def even_preprocess(self: Any, routing_map: Tensor) -> Tensor:
        counted: Tensor = preprocess(
            self, even_map(*routing_map.shape, per_token=self.config.moe_router_topk)
        )
        return counted

    def gather_counts(input_: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Tensor:
        if input_.is_meta:
            gathered: Tensor = gather(input_, *args, group=group, **kwargs)
            return gathered
        # On a GPU the counts are on the device when they are gathered.
        gather(input_.to("meta"), *args, group=group, **kwargs)
        return torch.cat([input_] * group.size())

    dispatcher.preprocess = even_preprocess
    token_dispatcher.gather_from_sequence_parallel_region = gather_counts


def even_map(num_tokens: int, num_experts: int, *, per_token: int) -> Tensor:
    """A routing map, bool [tokens, experts], whose experts' loads differ by at most one."""
    chosen = torch.arange(num_tokens * per_token) % num_experts
    found = torch.zeros(num_tokens, num_experts, dtype=torch.bool, device="cpu")
    found[torch.arange(num_tokens).repeat_interleave(per_token), chosen] = True
    return found
