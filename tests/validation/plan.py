"""Which runs are made, and which are held against each other, as data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Device = Literal["cpu", "cuda"]

# By the number of GPUs; a machine with more makes the smaller runs too.
LAYOUTS: Mapping[int, tuple[str, str]] = {
    1: ("colocated on 1 rank", ""),
    2: ("2 ranks: encoder | llm", "--encoder-dp 1 --llm-dp 1"),
    8: (
        "8 ranks, colocated: tp 2, pp 2, dp 2 each",
        "--encoder-offset 0 --encoder-tp 2 --encoder-pp 2 --encoder-dp 2 "
        "--llm-offset 0 --llm-tp 2 --llm-pp 2 --llm-dp 2",
    ),
}


_PACKED = "--packing-buffer-size 8 --micro-batch-size 1 --seq-length 96"

# What else the tests combine on hosts, in float32: number of ranks, name, words and flags.
VARIANTS: tuple[tuple[int, str, str, str], ...] = (
    (
        2,
        "experts",
        "2 ranks, colocated: dp 2 each, llm ep 2, exchanges overlapped",
        "--encoder-offset 0 --encoder-dp 2 --llm-offset 0 --llm-dp 2 --llm-ep 2 "
        "--overlap-grad-reduce --overlap-param-gather",
    ),
    (
        2,
        "tensors",
        "2 ranks, colocated: tp 2 each, layers recomputed",
        "--encoder-offset 0 --encoder-tp 2 --llm-offset 0 --llm-tp 2 --recompute-granularity full",
    ),
    (
        2,
        "stages",
        "2 ranks, colocated: pp 2 each, the encoder 2 microbatches ahead",
        "--encoder-offset 0 --encoder-pp 2 --llm-offset 0 --llm-pp 2 --encoder-run-ahead 2",
    ),
    (2, "packed", "2 ranks: encoder | llm, packed", f"--encoder-dp 1 --llm-dp 1 {_PACKED}"),
    (
        8,
        "fan-in",
        "8 ranks: encoder dp 4 | llm tp 2, dp 2, ep 2",
        "--encoder-dp 4 --llm-tp 2 --llm-dp 2 --llm-ep 2",
    ),
    (
        8,
        "fan-out",
        "8 ranks: encoder tp 2, pp 2 | llm dp 4, ep 4",
        "--encoder-tp 2 --encoder-pp 2 --llm-dp 4 --llm-ep 4",
    ),
)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest relative differences that pass.

    Attributes:
        loss: Of the loss, at every step.
        norm: Of the gradient norm, at every step.
    """

    loss: float
    norm: float


# On a host layouts differ by the order of float32 sums. On a GPU products of float32 are made from
# 11 bits of each factor (TF32), of bfloat16 from 8, and kernels add in no fixed order: these bounds
# follow from that and have not been measured.
_EXACT = Tolerance(0.0, 0.0)
_SUMS = Tolerance(1e-5, 1e-4)
_TF32 = Tolerance(2e-3, 2e-2)
# On a host bfloat16 is 1.4e-2 from float32 in loss after four steps, 1.8e-2 in norm.
_BF16 = Tolerance(5e-2, 2e-1)
_ACTIVATIONS: Mapping[Device, float] = {"cpu": 1e-5, "cuda": 2e-2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A training run, which leaves its curves in a folder of its name.

    Attributes:
        name: Name of the folder.
        device: Kind of device.
        ranks: Number of ranks.
        layout: Words for the grids.
        flags: Flags beside those of every run.
    """

    name: str
    device: Device
    ranks: int
    layout: str
    flags: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Two runs that should train alike.

    Attributes:
        what: Words for the table.
        run: The run that is looked at.
        against: Name of the run that it is held against.
        tolerance: Largest differences that pass.
        activations: Largest difference of activations at the first step; None compares curves.
    """

    what: str
    run: Run
    against: str
    tolerance: Tolerance
    activations: float | None = None


REFERENCE = Run(
    name="host",
    device="cpu",
    ranks=1,
    layout=LAYOUTS[1][0],
    flags="--fp32 --save-activations {runs}/host/activations",
)
"""Most runs are held against the same samples on one rank of the host, in float32."""

PACKED_REFERENCE = Run(
    name="host-packed",
    device="cpu",
    ranks=1,
    layout=f"{LAYOUTS[1][0]}, packed",
    flags=f"--fp32 {_PACKED}",
)
"""Packed runs have other samples in a step."""

REFERENCES: Mapping[str, Run] = {run.name: run for run in (REFERENCE, PACKED_REFERENCE)}


def checks(device: Device, gpus: int, iterations: int) -> Iterator[Check]:
    """Checks of a machine; each run but the references is made before it is needed.

    Args:
        device: Kind of device; "cpu" tries the script itself.
        gpus: Number of GPUs.
        iterations: Length of a run.
    """
    fp32 = _SUMS if device == "cpu" else _TF32

    def run(name: str, ranks: int, layout: str, flags: str) -> Run:
        return Run(name=name, device=device, ranks=ranks, layout=layout, flags=flags)

    for ranks, (layout, flags) in LAYOUTS.items():
        if ranks > gpus:
            continue
        saving = " --save-activations {runs}/1-fp32/activations" if ranks == 1 else ""
        exactly = run(f"{ranks}-fp32", ranks, layout, f"{flags} --fp32{saving}")
        yield Check(what="float32 against the host", run=exactly, against="host", tolerance=fp32)
        if ranks == 1:
            yield Check(
                what="activations of step 1 against the host",
                run=exactly,
                against="host",
                tolerance=fp32,
                activations=_ACTIVATIONS[device],
            )
        roughly = run(f"{ranks}-bf16", ranks, layout, f"{flags} --bf16")
        yield Check(what="bfloat16 against the host", run=roughly, against="host", tolerance=_BF16)
    for ranks, name, layout, flags in VARIANTS:
        if ranks > gpus:
            continue
        exactly = run(name, ranks, layout, f"{flags} --fp32")
        against = (PACKED_REFERENCE if _PACKED in flags else REFERENCE).name
        yield Check(what="float32 against the host", run=exactly, against=against, tolerance=fp32)
    largest = max(ranks for ranks in LAYOUTS if ranks <= gpus)
    layout, flags = LAYOUTS[largest]
    middle = iterations // 2
    saving = f"--save {{runs}}/saved --save-interval {middle} --exit-interval {middle}"
    half = run("first-half", largest, layout, f"{flags} --bf16 {saving}")
    rest = run("resumed", largest, layout, f"{flags} --bf16 --load {{runs}}/saved")
    again = _EXACT if device == "cpu" else _TF32
    for one, what in ((half, "the same run again, saving"), (rest, "resumed from its middle")):
        yield Check(what=what, run=one, against=f"{largest}-bf16", tolerance=again)
