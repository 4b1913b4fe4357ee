"""Choice of the next token from its logits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from megatron_mimo.settings import MoreThan, Number, Within, check_fields
from megatron_mimo.settings.ranges import MOST_POSITIONS, MOST_SEED

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen, and when an answer is cut off.

    Attributes:
        temperature: Divisor of the logits: 0 always takes the likeliest token, 1 draws as the model
            says.
        top_p: Share of the probability that the likeliest tokens must have together to be drawn
            from, above 0 to 1.
        top_k: Number of the likeliest tokens that are drawn from; left out: all.
        max_new_tokens: Largest number of tokens of an answer.
        seed: Seed of the draws; left out: another one each time.
    """

    temperature: Annotated[float, Within(0, 1000)] = 0.0
    top_p: Annotated[float, MoreThan(0, 1)] = 1.0
    top_k: Annotated[Number, Within(1, 10_000_000)] = None
    max_new_tokens: Annotated[int, Within(1, MOST_POSITIONS)] = 256
    seed: Annotated[Number, Within(0, MOST_SEED)] = None

    def __post_init__(self) -> None:
        check_fields(self)


def choose(logits: "Tensor", sampling: Sampling, random: "torch.Generator") -> int:
    """The number of the next token.

    Temperature, top-k and top-p apply in this order, as in transformers' `generate`.

    Args:
        logits: Logits [V], of any float dtype; minus infinity for tokens that are never chosen.
        sampling: How to choose.
        random: Generator of the draws, on the host; not used at temperature 0.
    """
    import torch

    if sampling.temperature == 0:
        return int(logits.argmax())
    # On the host, where the generator is: the same seed draws the same on every device.
    scores = logits.float().cpu() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scores):
        least = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True)
        # Those before which the likelier ones have the share already; never the likeliest.
        left_out = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities[tokens[left_out]] = 0
    return int(torch.multinomial(probabilities, 1, generator=random))
