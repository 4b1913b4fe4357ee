"""Mamba-2 on any device in plain torch: causal convolution, state-space scan, gated norm.

The scan is the chunked form of state space duality (Dao and Gu 2024, "Transformers are SSMs",
section 6): matrix products inside a chunk, and a state handed from chunk to chunk. It is exact, its
work grows linearly with the sequence, and no loop runs over tokens.

Letters: b batch, l sequence, c chunks, q tokens of a chunk, h heads, p width of a head, g groups
that share B and C, r = h / g, n size of the state, d channels of the convolution, k its width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Tokens of a chunk. The products inside a chunk grow with it, the number of states shrinks; the
# result does not depend on it.
_CHUNK = 64


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Depthwise convolution over a token and the k - 1 before it, then SiLU.

    Args:
        x: [b, l, d].
        weight: [d, k].
        bias: [d].
        seq_idx: int [1, l], the document of each token; a token sees its own document only. None
            for one document a row.

    Returns:
        [b, l, d].
    """
    width, length = weight.size(1), x.size(1)
    total = x * weight[:, -1] + bias
    for back in range(1, min(width, length)):
        earlier = x[:, :-back]
        if seq_idx is not None:
            same = seq_idx[:, back:] == seq_idx[:, :-back]
            earlier = earlier * same[..., None]
        total = total + F.pad(earlier * weight[:, -1 - back], (0, 0, back, 0))
    return F.silu(total)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """y[t] = C[t] . S[t] with S[t] = exp(dt[t] A) S[t-1] + dt[t] B[t] x[t], for every head.

    Args:
        x: [b, l, h, p].
        dt: [b, l, h], steps, positive.
        a: [h], negative.
        b: [b, l, g, n]; g divides h.
        c: [b, l, g, n].
        seq_idx: int [1, l], the document of each token, ascending; each starts from a zero state.

    Returns:
        [b, l, h, p], in the dtype of `x`; sums are fp32 or better.
    """
    dtype, (batch, length, heads, width) = x.dtype, x.shape
    groups, state = b.shape[2:]
    at_least = torch.promote_types(dtype, torch.float32)
    x, dt, a, b, c = (tensor.to(at_least) for tensor in (x, dt, a, b, c))
    chunk = min(_CHUNK, length)
    extra = -length % chunk
    if extra:
        # Steps of zero neither decay the state nor add to it.
        x, b, c = (F.pad(tensor, (0, 0, 0, 0, 0, extra)) for tensor in (x, b, c))
        dt = F.pad(dt, (0, 0, 0, extra))
        if seq_idx is not None:
            seq_idx = F.pad(seq_idx, (0, extra), value=-1)
    # [b, c, g, r, q] for what is of a head, [b, c, g, q, .] for what is of a group.
    shape = (batch, -1, chunk, groups, heads // groups)
    dt = dt.view(shape).permute(0, 1, 3, 4, 2)
    x = x.view(*shape, width).permute(0, 1, 3, 4, 2, 5)
    b, c = (tensor.view(batch, -1, chunk, groups, state).transpose(2, 3) for tensor in (b, c))
    log_decay = (dt * a.view(groups, -1, 1)).cumsum(-1)
    x = x * dt[..., None]
    same, at_end, at_start, kept = _documents(seq_idx, chunk)

    # Inside a chunk: token i sees j <= i.
    visible = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    if same is not None:
        visible = visible & same
    between = log_decay[..., :, None] - log_decay[..., None, :]
    weights = between.masked_fill(~visible, -torch.inf).exp()
    inside = (weights * (c @ b.transpose(-1, -2))[:, :, :, None]) @ x

    # What a chunk adds to the state: [b, c, g, r * p, n].
    to_end = (log_decay[..., -1:] - log_decay).exp()
    if at_end is not None:
        to_end = to_end * at_end
    added = (x * to_end[..., None]).transpose(3, 4).flatten(4).transpose(-1, -2) @ b
    # The state that each chunk starts from.
    carried = log_decay[..., -1].exp()
    if kept is not None:
        carried = carried * kept
    carried = carried.repeat_interleave(width, dim=-1)[..., None]
    states, before = torch.zeros_like(added[:, 0]), []
    # Unbound: an index would write a whole gradient for each chunk.
    for kept_part, new in zip(carried.unbind(1), added.unbind(1), strict=True):
        before.append(states)
        states = states * kept_part + new
    earlier = c @ torch.stack(before, dim=1).transpose(-1, -2)
    earlier = earlier.unflatten(-1, (-1, width)).transpose(3, 4)
    from_start = log_decay.exp()
    if at_start is not None:
        from_start = from_start * at_start
    y = inside + earlier * from_start[..., None]
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, width)
    cut: Tensor = y[:, :length].to(dtype)
    return cut


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
    **unsupported: Any,
) -> Tensor:
    """All of a Mamba-2 mixer between its two projections, as megatron-core's `MambaMixer` calls it.

    Takes the place of mamba-ssm's `mamba_split_conv1d_scan_combined`.

    Args:
        zxbcdt: [b, l, d_inner + (d_inner + 2 g n) + h]: gate, channels of the convolution, steps.
        conv1d_weight: [d_inner + 2 g n, k].
        conv1d_bias: [d_inner + 2 g n].
        dt_bias: [h], added to the steps before softplus.
        A: [h], negative.
        D: [h], or [h, p]: how much of a token's own input is added.
        chunk_size: Of mamba-ssm's kernel; takes no part here.
        activation: Of the convolution; "silu".
        headdim: p; None when D has it.
        ngroups: g.
        norm_before_gate: Must be False.
        seq_idx: int [1, l], the document of each token; None for one document a row.
        unsupported: Refused unless None.

    Returns:
        [b, l, d_inner], multiplied by SiLU of the gate.
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
    channels = causal_conv(channels, conv1d_weight, conv1d_bias, seq_idx)
    state = (channels.size(-1) - inner) // (2 * ngroups)
    x, b, c = channels.split([inner, ngroups * state, ngroups * state], dim=-1)
    x = x.unflatten(-1, (heads, width))
    steps = F.softplus(dt.to(dt_bias.dtype) + dt_bias)
    b, c = (tensor.unflatten(-1, (ngroups, state)) for tensor in (b, c))
    y = ssd_scan(x, steps, A, b, c, seq_idx)
    y = y + x * (D if D.dim() == 2 else D[:, None]).to(x.dtype)
    gated: Tensor = y.flatten(2) * F.silu(gate)
    return gated


class GroupedRMSNorm(nn.Module):
    """RMSNorm over groups of channels, as mamba-ssm's `RMSNormGated` behind the gate.

    Args:
        hidden_size: Channels of this tp rank.
        eps: Added to the mean square.
        group_size: Channels that are normalised together.
        norm_before_gate: Must be False.
        device: Of the weight.
        dtype: Of the weight.
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
        """Normalise [..., d], after multiplying by SiLU of `gate` where there is one."""
        if gate is not None:
            x = x * F.silu(gate)
        grouped = x.unflatten(-1, (-1, self.group_size)).to(
            torch.promote_types(x.dtype, torch.float32)
        )
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
