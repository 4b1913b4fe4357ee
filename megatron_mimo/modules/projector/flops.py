"""Operations of a projector."""

from megatron_mimo.modules.adapter import FlopsContext
from megatron_mimo.modules.flops import Flops
from megatron_mimo.modules.projector.config import ProjectorConfig


def projector_flops(
    projector: ProjectorConfig,
    context: FlopsContext,
    *,
    part: str,
    size: int,
    rows: int,
    below: bool,
) -> Flops:
    """Number of operations of a projector.

    Args:
        projector: Architecture of the projector.
        context: Parts that train, and the width of the language model.
        part: Name of the projector among the module's parts.
        size: Width of a row before the projector.
        rows: Number of rows.
        below: Whether anything before the projector trains.
    """
    inner, width = projector.ffn_hidden_size, context.row_width
    whole = context.trains(part) and part not in context.lora
    # The norm in front has a weight to train.
    to_input = below or (whole and projector.normalization != "none")
    first = context.linear(part, backward=to_input)
    if projector.kind == "affine":
        return first("linear", rows, size, width)
    adapters = context.lora.get(part)
    to_second = below or whole or (adapters is not None and "linear_fc1" in adapters.layers)
    second = context.linear(part, backward=to_second)
    return first("linear_fc1", rows, size, inner) + second("linear_fc2", rows, inner, width)
