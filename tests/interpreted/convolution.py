"""The convolution of causal-conv1d in torch, in the place of its compiled module.

It is written in CUDA, which no interpreter runs. Forward is the reference that the package has
beside it; backward is written out, since the package calls it where autograd does not look.
Shapes: b batch, d channels, l tokens, k width.
"""

from torch import Tensor


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    out: Tensor,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> None:
    """Write the convolution of `x` [b, d, l] with `weight` [d, k] to `out` [b, d, l]."""
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    assert initial_states is None and final_states_out is None
    activation = "silu" if silu_activation else None
    out.copy_(causal_conv1d_ref(x, weight, bias, activation=activation, seq_idx=seq_idx))


def causal_conv1d_bwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    dinitial_states: Tensor | None,
    silu_activation: bool,
) -> None:
    """Write the gradients of x [b, d, l], weight [d, k] and bias [d], of that of the output."""
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    assert initial_states is None and dfinal_states is None and dinitial_states is None
    gradient = dout.float()
    if silu_activation:
        before = causal_conv1d_ref(x.float(), weight.float(), bias.float(), seq_idx=seq_idx)
        gate = before.sigmoid()
        gradient = gradient * gate * (1 + before * (1 - gate))
    dbias.copy_(gradient.sum((0, 2)))
    dx.zero_()
    width, length = weight.size(1), x.size(2)
    for back in range(min(width, length)):
        # Of outputs, and of the tokens that lie `back` before them.
        later, tap = gradient[..., back:], width - 1 - back
        if seq_idx is not None:
            later = later * (seq_idx[:, back:] == seq_idx[:, : length - back])[:, None]
        dweight[:, tap] = (later * x[..., : length - back].float()).sum((0, 2))
        dx[..., : length - back] += (later * weight[:, tap, None].float()).to(dx.dtype)
