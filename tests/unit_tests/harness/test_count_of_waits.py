"""What `tests.waits` lists, and what it lets go."""

from collections.abc import Callable

import pytest

# What a line does with `host`, `pinned` (of the host), `there` and `flags` (on the device) -> kind.
WAITS = {
    "there.sum().item()": "read",
    "float(there[0])": "read",
    "bool((there > 0).all())": "read",
    "there.tolist()": "read",
    "there.nonzero()": "read",
    "there[flags]": "read",
    "torch.repeat_interleave(there, flags.long())": "read",
    "torch.equal(there, there + 1)": "read",
    "there.cpu()": "copy to host",
    "there.to('cpu')": "copy to host",
    "host.copy_(there)": "copy to host",
    "host.to(there.device)": "copy to device",
    "host.cuda(non_blocking=True)": "copy to device",
    "pinned.to('cuda')": "copy to device",
    "there.copy_(host)": "copy to device",
    "there[torch.tensor([0, 1])]": "copy to device",
    "torch.tensor([1.0, 2.0], device='cuda')": "copy to device",
    "torch.cuda.synchronize()": "synchronize",
    "there + host": "mixed",
    "(there * there.new_zeros(3)).sum() + (there.detach().requires_grad_() * host).sum()": "mixed",
}
FREE = (
    "pinned.to('cuda', non_blocking=True) + there",
    "there * host.sum()",
    "there.to(torch.float64).to(there.device)",
    "torch.zeros(3, device=there.device) + there",
    "torch.zeros_like(there) + there.new_ones(3)",
    "there.masked_fill_(flags, 0.0)",
    "host.tolist(), host[host > 0], host.sum().item()",
    "torch.repeat_interleave(there, flags.long(), output_size=3)",
    "there.detach().requires_grad_().square().sum().backward()",
)


def kinds(lines: tuple[str, ...]) -> dict[str, list[str]]:
    """Line -> kinds of waits that it makes."""
    import torch

    from tests.waits import counting

    found = {}
    with counting() as waits:
        for line in lines:
            names = {
                "torch": torch,
                "host": torch.ones(3),
                "pinned": torch.ones(3).pin_memory(),
                "there": torch.ones(3, device="cuda"),
                "flags": torch.ones(3, device="cuda") > 0,
            }
            waits.clear()
            eval(line, names)
            found[line] = [wait.kind for wait in waits]
    return found


def test_what_would_wait_is_listed_once(
    run_ranks: Callable[..., list], subtests: pytest.Subtests
) -> None:
    (found,) = run_ranks(1, kinds, tuple(WAITS))
    for line, kind in WAITS.items():
        with subtests.test(line=line):
            assert found[line] == [kind]


def test_what_does_not_wait_is_not(
    run_ranks: Callable[..., list], subtests: pytest.Subtests
) -> None:
    (found,) = run_ranks(1, kinds, FREE)
    for line in FREE:
        with subtests.test(line=line):
            assert found[line] == []


def test_everything_is_as_before_afterwards(run_ranks: Callable[..., list]) -> None:
    run_ranks(1, leave_as_it_was)


def leave_as_it_was() -> None:
    import torch

    from tests.waits import counting

    owners = (torch.Tensor, torch, torch.cuda)
    before = [dict(vars(owner)) for owner in owners]
    with counting():
        assert torch.Tensor.to is not before[0]["to"]
    for owner, attributes in zip(owners, before, strict=True):
        assert all(vars(owner).get(name) is value for name, value in attributes.items())
    assert vars(torch.Tensor).keys() == before[0].keys()
