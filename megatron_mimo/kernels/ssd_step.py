"""Mamba-2 token by token, in plain torch: the recurrence that `ssd` computes at once.

A model that writes text reads one token at a time. The states of the convolution and of the scan
(`ssd.States`) hold all that a layer has to know of the tokens before it, whatever their number.

Letters are those of `ssd`: b batch, h heads, p width of a head, g groups, n size of the state, d
channels of the convolution, k its width.
"""

import torch.nn.functional as F
from torch import Tensor

from megatron_mimo.kernels.ssd import States, at_least_fp32


def conv_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    """The next output of `ssd.causal_conv`; moves the state on.

    Args:
        x: Input of one token, [b, d].
        weight: Weight [d, k] of each channel.
        bias: Bias [d].
        state: The k inputs before, [b, d, k], the newest last; changed in place.

    Returns:
        Output [b, d] in the dtype of `x`, rounded to it once; sums are fp32 or better.
    """
    state.copy_(state.roll(-1, dims=-1))
    state[..., -1] = x
    seen, weight, bias = (at_least_fp32(tensor) for tensor in (state, weight, bias))
    return F.silu((seen * weight).sum(-1) + bias).to(x.dtype)


def scan_step(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """The next output of `ssd.ssd_scan`; moves the state on.

    Args:
        x: Input of one token, [b, h, p].
        dt: Steps [b, h], positive.
        a: Decay rates [h], negative.
        b: Input matrices [b, g, n]; g divides h.
        c: Output matrices [b, g, n].
        state: State [b, h, p, n], fp32 or better; changed in place.

    Returns:
        Output [b, h, p] in the dtype of `x`; sums have the dtype of the state.
    """
    full, repeats = state.dtype, x.size(1) // b.size(1)
    dt = dt.to(full)
    b, c = (tensor.to(full).repeat_interleave(repeats, dim=1) for tensor in (b, c))
    moved = x.to(full) * dt[..., None]
    state.mul_((dt * a.to(full)).exp()[..., None, None])
    state.addcmul_(moved[..., None], b[:, :, None])
    return (state @ c[..., None]).squeeze(-1).to(x.dtype)


def mixer_step(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    d: Tensor,
    *,
    headdim: int,
    ngroups: int,
    states: States,
) -> Tensor:
    """The next output of `ssd.split_conv_scan`; moves the states on.

    Args:
        zxbcdt: Output of the first projection for one token, [b, d_inner + (d_inner + 2 g n) + h]:
            gate, channels of the convolution, steps.
        conv1d_weight: Weight [d_inner + 2 g n, k] of the convolution.
        conv1d_bias: Bias [d_inner + 2 g n] of the convolution.
        dt_bias: Bias [h], added to the steps before softplus.
        a: Decay rates [h], negative.
        d: Weight [h] of a token's own input in the output.
        headdim: Width of a head p.
        ngroups: Number of groups g.
        states: States after the token before, changed in place.

    Returns:
        Output [b, d_inner], multiplied by SiLU of the gate, in the dtype of `zxbcdt`.
    """
    heads = len(dt_bias)
    inner, size = heads * headdim, ngroups * states.scan.size(-1)
    gate, channels, dt = zxbcdt.split([inner, conv1d_weight.size(0), heads], dim=-1)
    channels = conv_step(channels, conv1d_weight, conv1d_bias, states.conv)
    x, b, c = channels.split([inner, size, size], dim=-1)
    x = at_least_fp32(x.unflatten(-1, (heads, headdim)))
    steps = F.softplus(dt.to(dt_bias.dtype) + dt_bias)
    b, c = (tensor.unflatten(-1, (ngroups, -1)) for tensor in (b, c))
    y = scan_step(x, steps, a, b, c, states.scan) + x * d[:, None]
    gated: Tensor = y.flatten(1) * F.silu(at_least_fp32(gate))
    return gated.to(zxbcdt.dtype)
