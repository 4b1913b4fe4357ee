"""Mamba-2 on a host: our chunked scan against transformers' and against a loop over tokens.

The scan alone, forward and with backward, fp32, at the sizes of the tiny preset and of an eighth of
a large one's layer; both sides get the same tensors and run in turns. The last rows of each size
set the longest sequence against twice the time of half of it: 1 is linear growth.

Then the whole tiny preset on 4 sequences of 512 tokens in one process: microseconds per token of
forward and backward, against transformers' NemotronH with the same weights.

    python benchmarks/bench_language.py [--smoke | --quick] [--json FILE]
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from benchlib.ranks import own_memory, turns
from benchlib.report import Row, Size, run_benchmark

# Lengths of a sequence in tokens, sequences and their length of the whole model, and repetitions.
CASES: dict[Size, tuple[tuple[int, ...], tuple[int, int], int]] = {
    "smoke": ((64, 128), (1, 128), 1),
    "quick": ((256, 1024), (4, 512), 5),
    "full": ((256, 1024, 4096, 8192), (4, 512), 9),
}
# (heads, width of a head, groups, state)
SIZES = {"tiny": (8, 32, 2, 32), "an eighth of large": (8, 64, 1, 128)}
TARGET, TARGET_TOKENS = 0.5, 1024
# Twice the time for twice the tokens, and what a noisy host adds.
GROWTH_TARGET = 1.15
VOCABULARY = 1024
Times = dict[str, list[float]]
Scan = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Any]


def tensors(size: tuple[int, int, int, int], length: int) -> list[torch.Tensor]:
    """Inputs of one sequence, float32: x [1, l, h, p], dt [1, l, h], A [h], B, C [1, l, g, n]."""
    heads, width, groups, state = size
    random = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    steps = torch.nn.functional.softplus(draw(1, length, heads) - 3)
    drawn = [draw(1, length, heads, width), steps, -torch.rand(heads, generator=random) * 15 - 1]
    drawn += [draw(1, length, groups, state), draw(1, length, groups, state)]
    return [tensor.requires_grad_() for tensor in drawn]


def transformers_scan() -> Scan:
    """The scan that transformers' NemotronH runs without mamba-ssm."""
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    return lambda x, dt, a, b, c: mamba2_chunk_scan(x, dt, a, b, c, chunk_size=128)


def token_by_token(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """The recurrence as it is written; arguments and result [1, l, h, p] as of `ssd_scan`."""
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
    """Seconds of one call on the tensors of `tensors`, x [1, l, h, p] and so on."""
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        output = scan(*given)
        if backward:
            torch.autograd.grad(output.sum(), given)
    return time.perf_counter() - start


def compare(
    ours: Scan, peer: Scan, given: list[torch.Tensor], backward: bool, repetitions: int
) -> Times:
    """Seconds of both scans on the same tensors, x [1, l, h, p] and so on.

    Raises:
        AssertionError: The results differ.
    """
    torch.testing.assert_close(ours(*given), peer(*given), rtol=1e-3, atol=1e-3)
    return in_turns(
        lambda: seconds(ours, given, backward), lambda: seconds(peer, given, backward), repetitions
    )


def in_turns(
    ours: Callable[[], float], peer: Callable[[], float], repetitions: int, *, alike: bool = False
) -> Times:
    """Results of both functions, called in turns; the first call of each is not counted.

    Args:
        ours: Function that returns seconds.
        peer: Function that returns seconds.
        repetitions: Number of calls of each.
        alike: Whether the other side is ours, too.
    """
    sides, times = {"ours": ours, "peer": peer}, Times(ours=[], peer=[])
    for repetition in range(repetitions + 1):
        for side in turns(tuple(sides), repetition):
            own_memory("ours" if alike else side)
            taken = sides[side]()
            if repetition:
                times[side].append(taken)
    return times


def whole_model(batch: int, length: int, repetitions: int) -> Row:
    """The tiny preset, forward and backward, microseconds per token."""
    from transformers import AutoModelForCausalLM, NemotronHConfig

    from megatron_mimo.config.presets import model_config
    from megatron_mimo.modules.hybrid import HybridConfig, HybridLM
    from megatron_mimo.modules.hybrid.weights import write_config

    architecture = model_config("nemotron-moe-vlm-tiny").part("language")
    assert isinstance(architecture, HybridConfig)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = NemotronHConfig(**write_config(architecture, VOCABULARY))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        ours = HybridLM.from_pretrained(folder, device="cpu").train()
        peer = AutoModelForCausalLM.from_pretrained(folder).train()
    ids = torch.randint(VOCABULARY, (batch, length))

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
    times = in_turns(lambda: step(ours, ours.logits), lambda: step(peer, their_logits), repetitions)
    return row(
        "Whole tiny preset",
        f"{batch} x {length} tokens, forward and backward",
        "by transformers",
        times,
        unit="us per token",
        scale=1e6 / (batch * length),
    )


def row(
    table: str,
    line: str,
    column: str,
    times: Times,
    *,
    target: float | None = None,
    unit: str = "ms",
    scale: float = 1e3,
) -> Row:
    """A row of seconds, in another unit."""
    return Row(
        table=table,
        line=line,
        column=column,
        ours=tuple(scale * taken for taken in times["ours"]),
        peer=tuple(scale * taken for taken in times["peer"]),
        target=target,
        unit=unit,
    )


def measure(size: Size) -> Iterator[Row]:
    """The rows of every case."""
    from megatron_mimo.kernels.ssd import ssd_scan

    def scan(*given: torch.Tensor) -> torch.Tensor:
        return ssd_scan(*given)[0]

    lengths, whole, repetitions = CASES[size]
    peer = transformers_scan()
    for name, widths in SIZES.items():
        for backward in (False, True):
            table = "Scan, forward and backward" if backward else "Scan, forward"
            for length in lengths:
                line, given = f"{name}, {length} tokens", tensors(widths, length)
                times = compare(scan, peer, given, backward, repetitions)
                target = TARGET if length == TARGET_TOKENS else None
                yield row(table, line, "by transformers", times, target=target)
                if length <= TARGET_TOKENS:
                    times = compare(scan, token_by_token, given, backward, repetitions)
                    yield row(table, line, "by a loop over tokens", times)
            longest, half = (tensors(widths, length) for length in (lengths[-1], lengths[-1] // 2))
            times = in_turns(
                partial(seconds, scan, longest, backward),
                partial(twice, scan, half, backward),
                repetitions,
                alike=True,
            )
            yield row(
                table,
                f"{name}, {lengths[-1]} tokens",
                "by twice half of them",
                times,
                target=GROWTH_TARGET,
            )
    yield whole_model(*whole, repetitions)


def twice(scan: Scan, given: list[torch.Tensor], backward: bool) -> float:
    """Twice the seconds of one call on tensors x [1, l, h, p] and so on."""
    return 2 * seconds(scan, given, backward)


if __name__ == "__main__":
    run_benchmark(__doc__, measure, threads=1)
