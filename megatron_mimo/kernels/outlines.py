"""What fused kernels allocate, for tensors without content: attention and the Mamba scan.

On torch's device "meta" scaled dot product attention falls back to products that hold every score,
S x S for each head, and the scan of `ssd` holds all its intermediate products. Fused kernels hold
neither, on a host (attention) or on a GPU (both). These functions take and return the same shapes,
and keep for backward what a fused kernel keeps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm import mamba_mixer
from torch import Tensor

from megatron_mimo.kernels import hybrid

# Tokens of a chunk of mamba-ssm's scan, each with a state.
_CHUNK = 128


def install_outlines(*, scan: bool) -> None:
    """Replace fused functions by their outlines in this process.

    Args:
        scan: Whether to replace the Mamba scan too: where a GPU would run that of mamba-ssm.
    """
    functional: Any = F
    functional.scaled_dot_product_attention = _attention
    if scan:
        hybrid._fill_in_what_is_absent()
        mamba_mixer.mamba_split_conv1d_scan_combined = _scan


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
) -> Tensor:
    """Attention over queries [B, A, S, D]: an output [B, A, S, D'], D' that of the values.

    Raises:
        RuntimeError: The shapes do not fit each other.
    """
    heads, groups = query.size(1), key.size(1)
    fits = (
        key.shape[:-1] == value.shape[:-1]
        and query.size(-1) == key.size(-1)
        and query.size(0) == key.size(0)
        and heads % groups == 0
    )
    if not fits:
        raise RuntimeError(
            f"attention of queries {list(query.shape)} to keys {list(key.shape)} and values "
            f"{list(value.shape)}: expected [B, heads, S, D] with equal B and D, and heads that "
            f"divide"
        )
    output: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output


class _Attention(torch.autograd.Function):
    """Keeps inputs, output, and a float32 sum for each query, as flash attention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.size(-1))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,  # noqa: N803 (mamba-ssm's name)
    D: Tensor,  # noqa: N803
    chunk_size: int,
    *,
    headdim: int | None = None,
    **_: Any,
) -> Tensor:
    """Outline of mamba-ssm's `mamba_split_conv1d_scan_combined`: [b, l, d] -> [b, l, d_inner].

    Raises:
        RuntimeError: The width of the input is not that of gate, channels and steps.
    """
    heads = len(dt_bias)
    inner = heads * (D.size(1) if headdim is None else headdim)
    channels = conv1d_weight.size(0)
    if zxbcdt.size(-1) != inner + channels + heads:
        raise RuntimeError(
            f"the Mamba scan was given width {zxbcdt.size(-1)}: expected {inner} of the gate, "
            f"{channels} of the convolution and {heads} steps"
        )
    output: Tensor = _Scan.apply(  # type: ignore[no-untyped-call]
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, inner
    )
    return output


class _Scan(torch.autograd.Function):
    """Keeps its input and output; convolution and states are computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        zxbcdt: Tensor,
        weight: Tensor,
        bias: Tensor,
        dt_bias: Tensor,
        rates: Tensor,
        skip: Tensor,
        inner: int,
    ) -> Tensor:
        held = _intermediate(zxbcdt, weight, inner)
        output = zxbcdt.new_empty(*zxbcdt.shape[:-1], inner)
        del held
        ctx.save_for_backward(zxbcdt, weight, bias, dt_bias, rates, skip, output)
        ctx.inner = inner
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        *inputs, _ = ctx.saved_tensors
        held = _intermediate(inputs[0], inputs[1], ctx.inner)
        gradients = [torch.empty_like(tensor) for tensor in inputs]
        del held
        return (*gradients, None)


def _intermediate(zxbcdt: Tensor, weight: Tensor, inner: int) -> list[Tensor]:
    """Convolved channels, and a float32 state for each chunk."""
    batch, length, _ = zxbcdt.shape
    channels = weight.size(0)
    # B and C share the rest of the channels; the state of a head is [p, n].
    state = (channels - inner) // 2
    return [
        zxbcdt.new_empty(batch, length, channels),
        zxbcdt.new_empty(batch, -(-length // _CHUNK), inner, state, dtype=torch.float32),
    ]
