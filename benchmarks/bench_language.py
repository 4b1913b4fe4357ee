"""Mamba-2 on a host: our chunked scan against transformers' and against a loop over tokens.

The scan alone, forward and with backward, fp32, at the sizes of the tiny preset and of an eighth of
a large one's layer; both sides get the same tensors and run in turns. The last rows of each size
set the longest sequence against twice the time of half of it: 1 is linear growth.

Then the whole tiny preset on 4 sequences of 512 tokens in one process: microseconds per token of
forward and backward, against transformers' NemotronH with the same weights.

    python benchmarks/bench_language.py [--quick] [--json FILE]
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from benchlib.report import Row, arguments, median_ratio, show, write

REPETITIONS = 5
# (heads, width of a head, groups, state)
SIZES = {"tiny": (8, 32, 2, 32), "an eighth of large": (8, 64, 1, 128)}
TARGET, TARGET_TOKENS = 0.5, 1024
# Twice the time for twice the tokens, and what a noisy host adds.
GROWTH_TARGET = 1.15
BATCH, LENGTH, VOCABULARY = 4, 512, 1024
Scan = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Any]


def tensors(size: tuple[int, int, int, int], length: int) -> list[torch.Tensor]:
    """x, dt, A, B and C of one sequence."""
    heads, width, groups, state = size
    random = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    steps = torch.nn.functional.softplus(draw(1, length, heads) - 3)
    drawn = [draw(1, length, heads, width), steps, -torch.rand(heads, generator=random) * 15 - 1]
    drawn += [draw(1, length, groups, state), draw(1, length, groups, state)]
    return [tensor.requires_grad_() for tensor in drawn]


def transformers_scan() -> Scan:
    """What transformers' NemotronH runs without mamba-ssm."""
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    return lambda x, dt, a, b, c: mamba2_chunk_scan(x, dt, a, b, c, chunk_size=128)


def token_by_token(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """The recurrence as it is written."""
    repeats = x.size(2) // b.size(2)
    b, c = b.repeat_interleave(repeats, dim=2), c.repeat_interleave(repeats, dim=2)
    state, outputs = x.new_zeros(1, x.size(2), x.size(3), b.size(3)), []
    decay = (dt * a).exp()[..., None, None]
    moved = x * dt[..., None]
    for t in range(x.size(1)):
        state = state * decay[:, t] + moved[:, t, :, :, None] * b[:, t, :, None]
        outputs.append((state * c[:, t, :, None]).sum(-1))
    return torch.stack(outputs, dim=1)


def seconds(scan: Scan, given: list[torch.Tensor], backward: bool) -> float:
    """Of one call."""
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        output = scan(*given)
        if backward:
            torch.autograd.grad(output.sum(), given)
    return time.perf_counter() - start


def compare(ours: Scan, peer: Scan, given: list[torch.Tensor], backward: bool) -> Any:
    """Medians of both, in turns."""
    found = ours(*given), peer(*given)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    times: tuple[list[float], list[float]] = ([], [])
    for repetition in range(REPETITIONS + 1):
        for side, scan in enumerate((ours, peer)):
            taken = seconds(scan, given, backward)
            if repetition:
                times[side].append(taken)
    return median_ratio(*times)


def whole_model() -> Row:
    """The tiny preset, forward and backward, microseconds per token."""
    from transformers import AutoModelForCausalLM, NemotronHConfig

    from megatron_mimo.language import HybridConfig, HybridLM
    from megatron_mimo.language.weights import write_config
    from megatron_mimo.presets import model_config

    architecture = model_config("nemotron-moe-vlm-tiny").language
    assert isinstance(architecture, HybridConfig)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = NemotronHConfig(**write_config(architecture, VOCABULARY))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        ours = HybridLM.from_pretrained(folder, device="cpu").train()
        peer = AutoModelForCausalLM.from_pretrained(folder).train()
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH))

    def step(model: torch.nn.Module, logits: Callable[[torch.Tensor], torch.Tensor]) -> float:
        start = time.perf_counter()
        found = logits(ids)[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(found.float(), ids[:, 1:].flatten()).backward()
        taken = time.perf_counter() - start
        model.zero_grad()
        return taken

    def their_logits(tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = peer(tokens, use_cache=False).logits
        return found

    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), their_logits(ids), rtol=1e-3, atol=1e-3)
    times: tuple[list[float], list[float]] = ([], [])
    for repetition in range(REPETITIONS + 1):
        taken = step(ours, ours.logits), step(peer, their_logits)
        if repetition:
            for side in range(2):
                times[side].append(taken[side])
    mine, theirs = median_ratio(*times)
    per_token = 1e6 / (BATCH * LENGTH)
    return Row(
        case=f"tiny preset, {BATCH} x {LENGTH} tokens, forward + backward, against transformers",
        ours=per_token * mine,
        peer=per_token * theirs,
        target=None,
        unit="us per token",
    )


def main() -> None:
    """Run every case and print the comparison."""
    flags = arguments(__doc__.splitlines()[0])
    from megatron_mimo.runtime.host.memory import keep_freed_memory
    from megatron_mimo.runtime.ssd import ssd_scan

    keep_freed_memory()
    peer, rows = transformers_scan(), []
    lengths = (256, 1024) if flags.quick else (256, 1024, 4096, 8192)
    for name, size in SIZES.items():
        for backward in (False, True):
            order = "forward + backward" if backward else "forward"
            for length in lengths:
                given = tensors(size, length)
                mine, theirs = compare(ssd_scan, peer, given, backward)
                target = TARGET if length == TARGET_TOKENS else None
                case = f"{name}, {length} tokens, {order}"
                rows.append(
                    Row(
                        case=f"{case}, against transformers",
                        ours=1000 * mine,
                        peer=1000 * theirs,
                        target=target,
                        unit="ms",
                    )
                )
                if length <= TARGET_TOKENS:
                    mine, theirs = compare(ssd_scan, token_by_token, given, backward)
                    rows.append(
                        Row(
                            case=f"{case}, against a loop over tokens",
                            ours=1000 * mine,
                            peer=1000 * theirs,
                            target=None,
                            unit="ms",
                        )
                    )
            longest, half = (tensors(size, length) for length in (lengths[-1], lengths[-1] // 2))
            long, short = median_ratio(
                [seconds(ssd_scan, longest, backward) for _ in range(REPETITIONS)],
                [seconds(ssd_scan, half, backward) for _ in range(REPETITIONS)],
            )
            rows.append(
                Row(
                    case=f"{name}, {lengths[-1]} tokens, {order}, against twice half of them",
                    ours=1000 * long,
                    peer=2000 * short,
                    target=GROWTH_TARGET,
                    unit="ms",
                )
            )
    rows.append(whole_model())
    show(__doc__.splitlines()[0], rows)
    write(rows, flags.json)


if __name__ == "__main__":
    main()
