"""Mamba-2 on any device in plain torch: causal convolution, state-space scan, gated norm.

The scan is the chunked form of state space duality (Dao and Gu 2024, "Transformers are SSMs",
section 6): matrix products inside a chunk, and a state handed from chunk to chunk. It is exact, its
work grows linearly with the sequence, and no loop runs over tokens.

Letters: b batch, l sequence, c chunks, q tokens of a chunk, h heads, p width of a head, g groups
that share B and C, r = h / g, n size of the state, d channels of the convolution, k its width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Tokens of a chunk. The products inside a chunk grow with it, the number of states shrinks; the
# result does not depend on it.
_CHUNK = 64


class States(NamedTuple):
    """What a Mamba-2 layer keeps of the tokens that it has read.

    Attributes:
        conv: The last k inputs of the convolution, [b, d, k], the newest last.
        scan: State of the scan, [b, h, p, n], fp32 or better.
    """

    conv: Tensor
    scan: Tensor


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Depthwise convolution over a token and the k - 1 before it, then SiLU.

    Args:
        x: Input [b, l, d].
        weight: Weight [d, k] of each channel.
        bias: Bias [d].
        seq_idx: Document of each token, int [1, l]; a token sees its own document only. None for
            one document per row.

    Returns:
        Output [b, l, d] in the dtype of `x`, rounded to it once; sums are fp32 or better.
    """
    dtype, width, length = x.dtype, weight.size(1), x.size(1)
    x, weight, bias = (at_least_fp32(tensor) for tensor in (x, weight, bias))
    total = x * weight[:, -1] + bias
    for back in range(1, min(width, length)):
        earlier = x[:, :-back]
        if seq_idx is not None:
            same = seq_idx[:, back:] == seq_idx[:, :-back]
            earlier = earlier * same[..., None]
        total = total + F.pad(earlier * weight[:, -1 - back], (0, 0, back, 0))
    return F.silu(total).to(dtype)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y[t] = C[t] . S[t] with S[t] = exp(dt[t] A) S[t-1] + dt[t] B[t] x[t], for every head.

    Args:
        x: Input [b, l, h, p].
        dt: Steps [b, l, h], positive.
        a: Decay rates [h], negative.
        b: Input matrices [b, l, g, n]; g divides h.
        c: Output matrices [b, l, g, n].
        seq_idx: Document of each token, int [1, l], ascending; each document starts from a zero
            state.

    Returns:
        Output [b, l, h, p] in the dtype of `x`, and the last state [b, h, p, n], fp32 or better, as
        all sums are.
    """
    dtype, length, width, groups = x.dtype, x.size(1), x.size(3), b.size(2)
    x, dt, a, b, c = (at_least_fp32(tensor) for tensor in (x, dt, a, b, c))
    chunk = min(_CHUNK, length)
    extra = -length % chunk
    if extra:
        # Steps of zero neither decay the state nor add to it.
        x, b, c = (F.pad(tensor, (0, 0, 0, 0, 0, extra)) for tensor in (x, b, c))
        dt = F.pad(dt, (0, 0, 0, extra))
        if seq_idx is not None:
            seq_idx = F.pad(seq_idx, (0, extra), value=-1)
    dt = rearrange(dt, "b (c q) (g r) -> b c g r q", q=chunk, g=groups)
    x = rearrange(x, "b (c q) (g r) p -> b c g r q p", q=chunk, g=groups)
    b, c = (rearrange(tensor, "b (c q) g n -> b c g q n", q=chunk) for tensor in (b, c))
    decay = dt * a.view(groups, -1, 1)
    x = x * dt[..., None]
    same, at_end, at_start, kept = _documents(seq_idx, chunk)

    # Inside a chunk: token i sees j <= i.
    visible = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    if same is not None:
        visible = visible & same
    # Added up for each pair: differences of one running sum, and their gradients, would cancel.
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril(-1)
    between = (decay[..., :, None] * later).cumsum(-2)
    weights = between.masked_fill(~visible, -torch.inf).exp()
    inside = (weights * (c @ b.transpose(-1, -2))[:, :, :, None]) @ x

    # What a chunk adds to the state: [b, c, g, r * p, n].
    to_end = between[..., -1, :].exp()
    if at_end is not None:
        to_end = to_end * at_end
    added = rearrange(x * to_end[..., None], "b c g r q p -> b c g q (r p)").mT @ b
    # The state that each chunk starts from.
    from_start = decay.cumsum(-1).exp()
    carried = from_start[..., -1]
    if kept is not None:
        carried = carried * kept
    carried = carried.repeat_interleave(width, dim=-1)[..., None]
    states, before = torch.zeros_like(added[:, 0]), []
    # Unbound: an index would write a whole gradient for each chunk.
    for kept_part, new in zip(carried.unbind(1), added.unbind(1), strict=True):
        before.append(states)
        states = states * kept_part + new
    earlier = c @ torch.stack(before, dim=1).transpose(-1, -2)
    earlier = rearrange(earlier, "b c g q (r p) -> b c g r q p", p=width)
    if at_start is not None:
        from_start = from_start * at_start
    y = inside + earlier * from_start[..., None]
    y = rearrange(y, "b c g r q p -> b (c q) (g r) p")
    last: Tensor = rearrange(states, "b g (r p) n -> b (g r) p n", p=width)
    return y[:, :length].to(dtype), last


def _documents(
    seq_idx: Tensor | None, chunk: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Masks that keep documents apart, each to be multiplied or combined; None without documents.

    Returns:
        [1, c, 1, 1, q, q], tokens of one document; [1, c, 1, 1, q], tokens of the document that the
        chunk ends in; [1, c, 1, 1, q], tokens of the document that the chunk before ended in;
        [1, c, 1, 1], chunks all of whose tokens are of that document.
    """
    if seq_idx is None:
        return None, None, None, None
    ids = seq_idx.view(1, -1, 1, 1, chunk)
    last = ids[..., -1:]
    previous = F.pad(last[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0), value=-2)
    return (
        ids[..., :, None] == ids[..., None, :],
        ids == last,
        ids == previous,
        (last == previous)[..., 0],
    )


def split_conv_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,  # noqa: N803 (mamba-ssm's name)
    D: Tensor,  # noqa: N803
    chunk_size: int,
    *,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = False,
    seq_idx: Tensor | None = None,
    states: States | None = None,
    **unsupported: Any,
) -> Tensor:
    """Everything of a Mamba-2 mixer between its two projections, as `MambaMixer` calls it.

    Replaces mamba-ssm's `mamba_split_conv1d_scan_combined` for megatron-core.

    Args:
        zxbcdt: Output of the first projection, [b, l, d_inner + (d_inner + 2 g n) + h]: gate,
            channels of the convolution, steps.
        conv1d_weight: Weight [d_inner + 2 g n, k] of the convolution.
        conv1d_bias: Bias [d_inner + 2 g n] of the convolution.
        dt_bias: Bias [h], added to the steps before softplus.
        A: Decay rates [h], negative.
        D: Weight [h], or [h, p], of a token's own input in the output.
        chunk_size: Chunk size of mamba-ssm's kernel; not used.
        activation: Activation after the convolution; must be "silu".
        headdim: Width of a head p; None when `D` has it.
        ngroups: Number of groups g.
        norm_before_gate: Must be False.
        seq_idx: Document of each token, int [1, l]; None for one document per row.
        states: Memory that the states after the last token are written to; None for nowhere.
        unsupported: Further settings of mamba-ssm's kernel; must be None.

    Returns:
        Output [b, l, d_inner], multiplied by SiLU of the gate, in the dtype of `zxbcdt`; after the
        convolution it is rounded to it once, as in mamba-ssm's kernel.

    Raises:
        ValueError: A setting is given that only mamba-ssm's kernel has.
    """
    given = [name for name, value in unsupported.items() if value is not None]
    if given or activation != "silu" or norm_before_gate:
        raise ValueError(
            f"the Mamba reference has neither {', '.join(given) or 'norms before the gate'} nor "
            f"activation {activation!r}: expected silu; other settings need mamba-ssm on a GPU"
        )
    heads = len(dt_bias)
    width = D.size(1) if headdim is None else headdim
    inner = heads * width
    gate, channels, dt = zxbcdt.split([inner, conv1d_weight.size(0), heads], dim=-1)
    if states is not None:
        states.conv.copy_(_last_columns(channels.transpose(1, 2), states.conv.size(2)))
    channels = causal_conv(channels, conv1d_weight, conv1d_bias, seq_idx)
    state = (channels.size(-1) - inner) // (2 * ngroups)
    x, b, c = channels.split([inner, ngroups * state, ngroups * state], dim=-1)
    x = at_least_fp32(x.unflatten(-1, (heads, width)))
    steps = F.softplus(dt.to(dt_bias.dtype) + dt_bias)
    b, c = (tensor.unflatten(-1, (ngroups, state)) for tensor in (b, c))
    y, last = ssd_scan(x, steps, A, b, c, seq_idx)
    if states is not None:
        states.scan.copy_(last)
    y = y + x * (D if D.dim() == 2 else D[:, None])
    gated: Tensor = y.flatten(2) * F.silu(at_least_fp32(gate))
    return gated.to(zxbcdt.dtype)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """A tensor [...] in float32; in its own dtype where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _last_columns(x: Tensor, count: int) -> Tensor:
    """The last columns of [b, d, l], with zeros in front where there are fewer: [b, d, count]."""
    return F.pad(x, (count - x.size(2), 0))


class GroupedRMSNorm(nn.Module):
    """RMSNorm over groups of channels, as mamba-ssm's `RMSNormGated` after the gate.

    Args:
        hidden_size: Number of channels of this tp rank.
        eps: Number added to the mean square.
        group_size: Number of channels that are normalised together; None for all.
        norm_before_gate: Must be False.
        device: Device of the weight.
        dtype: Dtype of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert not norm_before_gate, "the gate comes before the norm"
        self.eps = eps
        self.group_size = group_size or hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise [..., d], after multiplying by SiLU of `gate` where there is one.

        Args:
            x: Input [..., d].
            gate: Gate [..., d], or None.

        Returns:
            Output [..., d] in the dtype of `x`, rounded to it once; statistics are fp32 or better.
        """
        gated = at_least_fp32(x)
        if gate is not None:
            gated = gated * F.silu(at_least_fp32(gate))
        grouped = gated.unflatten(-1, (-1, self.group_size))
        normed = F.rms_norm(grouped, (self.group_size,), eps=self.eps).flatten(-2)
        return (normed * self.weight).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """The weight, sharded over the tp group that megatron-core's mixer sets."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
