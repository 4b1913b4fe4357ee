"""The Mamba-2 reference against a token-by-token recurrence in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.kernels import ssd
from megatron_mimo.kernels.ssd import GroupedRMSNorm, causal_conv, split_conv_scan, ssd_scan
from tests.properties import examples


def documents(lengths: list[int]) -> torch.Tensor:
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor([ids], dtype=torch.int32)


def inputs(length: int, batch: int = 1, heads: int = 4, groups: int = 2) -> dict[str, torch.Tensor]:
    """Leaves of float64; decays from nearly none to nearly all."""
    random = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    drawn = {
        "x": draw(batch, length, heads, 3),
        "dt": F.softplus(draw(batch, length, heads) * 2),
        "a": -torch.exp(draw(heads)),
        "b": draw(batch, length, groups, 5),
        "c": draw(batch, length, groups, 5),
    }
    return {name: tensor.requires_grad_() for name, tensor in drawn.items()}


def recurrence(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    seq_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """Of one token after the other, by the definition."""
    repeats = x.size(2) // b.size(2)
    b, c = b.repeat_interleave(repeats, dim=2), c.repeat_interleave(repeats, dim=2)
    state, outputs = torch.zeros(x.size(0), x.size(2), x.size(3), b.size(3), dtype=x.dtype), []
    for t in range(x.size(1)):
        if seq_idx is not None and t and seq_idx[0, t] != seq_idx[0, t - 1]:
            state = torch.zeros_like(state)
        decay = (dt[:, t] * a).exp()[..., None, None]
        new = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = state * decay + new
        outputs.append((state * c[:, t, :, None]).sum(-1))
    return torch.stack(outputs, dim=1)


def assert_same(length: int, seq_idx: torch.Tensor | None = None, batch: int = 1) -> None:
    """Outputs and every gradient."""
    leaves = inputs(length, batch)
    (found, _), wanted = ssd_scan(**leaves, seq_idx=seq_idx), recurrence(**leaves, seq_idx=seq_idx)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    pull = torch.randn(found.shape, dtype=torch.float64)
    got, want = (
        torch.autograd.grad((output * pull).sum(), list(leaves.values()), retain_graph=True)
        for output in (found, wanted)
    )
    for name, mine, other in zip(leaves, got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("chunk", [1, 4, 8, 64])
@pytest.mark.parametrize("length", [1, 7, 8, 64, 65, 130])
def test_scan(monkeypatch: pytest.MonkeyPatch, chunk: int, length: int) -> None:
    monkeypatch.setattr(ssd, "_CHUNK", chunk)
    assert_same(length, batch=2)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.sampled_from([4, 8, 64]))
@examples(40)
def test_nothing_leaks_between_documents(lengths: list[int], chunk: int) -> None:
    before, ssd._CHUNK = ssd._CHUNK, chunk
    try:
        assert_same(sum(lengths), documents(lengths))
    finally:
        ssd._CHUNK = before


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5))
@examples(40)
def test_convolution_of_each_document_alone(lengths: list[int], width: int) -> None:
    x = torch.randn(1, sum(lengths), 6, dtype=torch.float64)
    weight, bias = torch.randn(6, width, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    found = causal_conv(x, weight, bias, documents(lengths))
    start = 0
    for length in lengths:
        alone = F.pad(x[:, start : start + length].transpose(1, 2), (width - 1, 0))
        wanted = F.silu(F.conv1d(alone, weight[:, None], bias, groups=6)).transpose(1, 2)
        torch.testing.assert_close(found[:, start : start + length], wanted)
        start += length


@pytest.mark.parametrize("per_channel", [False, True])
def test_mixer_is_its_parts(per_channel: bool) -> None:
    heads, width, groups, state, length = 4, 3, 2, 5, 9
    inner = heads * width
    channels = inner + 2 * groups * state
    zxbcdt = torch.randn(2, length, inner + channels + heads, dtype=torch.float64)
    weight = torch.randn(channels, 4, dtype=torch.float64)
    bias, dt_bias = torch.randn(channels).double(), torch.randn(heads).double()
    a = -torch.rand(heads).double()
    d = torch.randn(heads, width).double() if per_channel else torch.randn(heads).double()
    found = split_conv_scan(
        zxbcdt,
        weight,
        bias,
        dt_bias,
        a,
        d,
        16,
        headdim=None if per_channel else width,
        ngroups=groups,
    )
    gate, rest = zxbcdt[..., :inner], zxbcdt[..., inner:]
    convolved = causal_conv(rest[..., :channels], weight, bias, None)
    x = convolved[..., :inner].reshape(2, length, heads, width)
    b, c = convolved[..., inner:].reshape(2, length, 2, groups, state).unbind(2)
    y = recurrence(x, F.softplus(rest[..., channels:] + dt_bias), a, b, c)
    y = y + x * (d if per_channel else d[:, None])
    torch.testing.assert_close(found, y.flatten(2) * F.silu(gate))


def test_half_precision_sums_in_full() -> None:
    leaves = inputs(200)
    whole, _ = ssd_scan(**leaves)
    half = {name: tensor.detach().to(torch.bfloat16) for name, tensor in leaves.items()}
    found, _ = ssd_scan(**half)
    assert found.dtype == torch.bfloat16
    exact, _ = ssd_scan(**{name: tensor.double() for name, tensor in half.items()})
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-2)
    assert whole.dtype == torch.float64


def test_half_precision_is_rounded_once_as_in_mamba_ssm() -> None:
    heads, width, groups, state, length = 4, 3, 2, 5, 9
    inner = heads * width
    channels = inner + 2 * groups * state
    zxbcdt = torch.randn(2, length, inner + channels + heads).bfloat16()
    # Without steps nothing is in the states, and what is left can be written down.
    zxbcdt[..., -heads:] = -200
    weight, bias = torch.randn(channels, 4).bfloat16(), torch.randn(channels).bfloat16()
    # megatron-core keeps it in float32; bfloat16 would have ones.
    d = torch.full((heads,), 1 + 2**-10)
    options: dict[str, Any] = {"headdim": width, "ngroups": groups}
    found = split_conv_scan(zxbcdt, weight, bias, torch.zeros(heads), -d, d, 16, **options)
    gate, rest = zxbcdt[..., :inner], zxbcdt[..., inner:-heads]
    convolved = causal_conv(rest, weight, bias, None)
    whole = causal_conv(rest.float(), weight.float(), bias.float(), None)
    assert torch.equal(convolved, whole.bfloat16())
    wanted = convolved[..., :inner].float() * (1 + 2**-10) * F.silu(gate.float())
    assert torch.equal(found, wanted.bfloat16())
    norm = GroupedRMSNorm(inner, group_size=width)
    assert torch.equal(norm(found, gate), norm(found.float(), gate.float()).bfloat16())


def test_strong_decay_has_finite_gradients() -> None:
    leaves = {name: tensor.detach().float() for name, tensor in inputs(128).items()}
    leaves["dt"] = leaves["dt"] * 100
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    ssd_scan(**leaves)[0].sum().backward()
    for name, tensor in leaves.items():
        assert tensor.grad is not None and tensor.grad.isfinite().all(), name


def test_what_the_reference_lacks_is_refused() -> None:
    zeros = torch.zeros
    given = (zeros(1, 2, 20), zeros(12, 4), zeros(12), zeros(4), zeros(4), zeros(4), 16)
    with pytest.raises(ValueError, match="initial_states"):
        split_conv_scan(*given, headdim=1, initial_states=zeros(1))
    with pytest.raises(ValueError, match="'relu'"):
        split_conv_scan(*given, headdim=1, activation="relu")


def test_norm_is_per_group_and_behind_the_gate() -> None:
    norm = GroupedRMSNorm(12, eps=1e-5, group_size=4).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x, gate = torch.randn(3, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    gated = (x * F.silu(gate)).view(3, 3, 4)
    wanted = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x, gate), wanted.flatten(1) * norm.weight)
    torch.testing.assert_close(norm(x * F.silu(gate)), norm(x, gate))
