"""Mamba-2 token by token against the same layers over whole sequences."""

import pytest
import torch
import torch.nn.functional as F

from megatron_mimo.kernels.ssd import States, split_conv_scan, ssd_scan
from megatron_mimo.kernels.ssd_step import mixer_step, scan_step

HEADS, WIDTH, GROUPS, STATE, KERNEL = 4, 3, 2, 5, 4
INNER = HEADS * WIDTH
CHANNELS = INNER + 2 * GROUPS * STATE


def weights(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    return draw(CHANNELS, KERNEL), draw(CHANNELS), draw(HEADS), -draw(HEADS).exp(), draw(HEADS)


def states(batch: int, dtype: torch.dtype) -> States:
    full = torch.promote_types(dtype, torch.float32)
    return States(
        torch.ones(batch, CHANNELS, KERNEL, dtype=dtype),
        torch.ones(batch, HEADS, WIDTH, STATE, dtype=full),
    )


# Shorter than the convolution, exactly a chunk, and beyond one.
@pytest.mark.parametrize("prompt", [1, 3, 64, 70])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_prompt_and_tokens_after_it_are_the_whole(prompt: int, batch: int) -> None:
    given, more = weights(torch.float64), 6
    zxbcdt = torch.randn(batch, prompt + more, INNER + CHANNELS + HEADS, dtype=torch.float64)
    sizes = {"headdim": WIDTH, "ngroups": GROUPS}
    kept, whole = states(batch, torch.float64), states(batch, torch.float64)
    wanted = split_conv_scan(zxbcdt, *given, 64, **sizes, states=whole)
    found = [split_conv_scan(zxbcdt[:, :prompt], *given, 64, **sizes, states=kept)]
    for t in range(prompt, prompt + more):
        found.append(mixer_step(zxbcdt[:, t], *given, **sizes, states=kept)[:, None])
    torch.testing.assert_close(torch.cat(found, dim=1), wanted)
    torch.testing.assert_close(kept.conv, whole.conv)
    torch.testing.assert_close(kept.scan, whole.scan)


def test_the_last_state_is_that_of_the_recurrence() -> None:
    random = torch.Generator().manual_seed(2)
    length = 130
    x = torch.randn(1, length, HEADS, WIDTH, generator=random, dtype=torch.float64)
    dt = F.softplus(torch.randn(1, length, HEADS, generator=random, dtype=torch.float64))
    b, c = torch.randn(2, 1, length, GROUPS, STATE, generator=random, dtype=torch.float64)
    a = -torch.rand(HEADS, generator=random, dtype=torch.float64)
    outputs, last = ssd_scan(x, dt, a, b, c)
    state, steps = torch.zeros_like(last), []
    for t in range(length):
        steps.append(scan_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], state))
    torch.testing.assert_close(torch.stack(steps, dim=1), outputs)
    torch.testing.assert_close(state, last)


def test_half_precision_keeps_its_state_in_full() -> None:
    given = weights(torch.bfloat16)
    zxbcdt = torch.randn(1, 200, INNER + CHANNELS + HEADS).bfloat16()
    kept = states(1, torch.bfloat16)
    sizes = {"headdim": WIDTH, "ngroups": GROUPS}
    wanted = split_conv_scan(zxbcdt, *given, 64, **sizes)
    split_conv_scan(zxbcdt[:, :1], *given, 64, **sizes, states=kept)
    found = [mixer_step(zxbcdt[:, t], *given, **sizes, states=kept) for t in range(1, 200)]
    assert kept.scan.dtype == torch.float32 and found[0].dtype == torch.bfloat16
    difference = (torch.stack(found, dim=1) - wanted[:, 1:]).float().abs().max()
    assert difference / wanted.float().abs().max() < 2**-6
