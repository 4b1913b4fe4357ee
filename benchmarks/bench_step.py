"""A whole training step: ours against megatron-core's MimoModel, schedule and MimoOptimizer.

- *compute*: the same layers, sizes and samples, in fp32. Four ranks keep two cores busy whatever
  the schedule, so what counts is the CPU time that all ranks spend, and the memory that they take.
- *emulated*: forwards and backwards are waits, so that two cores can show overlap. Rows and their
  gradients cross for real. The language model's forward takes 20 ms and its backward 40; the
  encoder's take 0.7 of that, always or on average (lognormal, sigma 1, three draws of a step, the
  same for both). Ours is also held against the critical path of its schedule under these draws.

    python benchmarks/bench_step.py [--smoke | --quick] [--json FILE]
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchlib.ranks import in_turns, own_memory, run_ranks, turns
from benchlib.report import Row, Size, run_benchmark

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1 to 1": ({}, {}),
    "2 to 2": ({"dp": 2}, {"dp": 2}),
    "1 to 2": ({}, {"dp": 2}),
    "2 to 1": ({"dp": 2}, {}),
    "1 to 1, llm pp 2": ({}, {"pp": 2}),
}
RUN_AHEAD = 3
FORWARD_S = 0.020
ENCODER_SHARE = 0.7
SIGMA = 1.0
DRAWS = 3
MICROBATCHES = 16
# Layouts of real compute, repetitions of each, and pixels of an image's side; then layouts of
# emulated compute.
CASES: dict[Size, tuple[tuple[str, ...], int, int, tuple[str, ...]]] = {
    "smoke": (("1 to 1",), 1, 64, ("1 to 1",)),
    "quick": (("2 to 2",), 3, 256, ("1 to 1",)),
    "full": (("2 to 2", "1 to 2"), 7, 256, tuple(LAYOUTS)),
}


def measure(size: Size) -> Iterator[Row]:
    """The rows of every case."""
    computed, repetitions, pixels, emulated_layouts = CASES[size]
    for name in computed:
        yield from compute_rows(name, repetitions, pixels)
    for name in emulated_layouts:
        for kind in ("steady",) if size == "smoke" else ("steady", "varying"):
            yield from emulated_rows(name, kind, 1 if size == "smoke" else 3)


def compute_rows(name: str, repetitions: int, pixels: int) -> Iterator[Row]:
    """CPU time and memory of real compute."""
    given = {"layout": name, "repetitions": repetitions, "pixels": pixels}
    given["warm_up"] = min(2, repetitions - 1)
    ranks, table = num_ranks(name), "Real compute"
    found = run_ranks(compute, ranks, given | {"sides": ["ours", "peer"]})
    for column, unit, key, target in (
        ("CPU time of all ranks", "CPU s", "cpu", 0.8),
        ("wall time", "s", "wall", None),
    ):
        yield Row(
            table=table,
            line=name,
            column=column,
            ours=tuple(found["ours"][key]),
            peer=tuple(found["peer"][key]),
            target=target,
            unit=unit,
        )
    peaks = {}
    for side in ("ours", "peer"):
        peaks[side] = run_ranks(compute, ranks, given | {"sides": [side]})[side]["peak"] / 2**20
    yield Row(
        table=table,
        line=name,
        column="peak memory of all ranks",
        ours=(peaks["ours"],),
        peer=(peaks["peer"],),
        target=1.0,
        unit="MiB",
    )


def emulated_rows(name: str, kind: str, repetitions: int) -> Iterator[Row]:
    """Wall time where compute is a wait."""
    given = {"layout": name, "kind": kind, "repetitions": repetitions}
    found = run_ranks(emulated, num_ranks(name), given)
    ours, peer, table = tuple(found["ours"]), tuple(found["peer"]), "Emulated compute"
    yield Row(
        table=table,
        line=name,
        column=f"{kind}: by the critical path",
        ours=ours,
        peer=(found["critical"],) * len(ours),
        target=1.05,
        unit="s",
    )
    yield Row(
        table=table,
        line=name,
        column=f"{kind}: by the peer",
        ours=ours,
        peer=peer,
        target=0.85 if kind == "varying" else None,
        unit="s",
    )
    yield Row(
        table=table,
        line=name,
        column=f"{kind}: bound by the peer",
        ours=(found["bound"],) * len(peer),
        peer=peer,
        unit="s",
    )


def num_ranks(name: str) -> int:
    """Ranks of a layout."""
    encoder, llm = LAYOUTS[name]
    return int(encoder.get("dp", 1) + llm.get("dp", 1) * llm.get("pp", 1))


def layout_of(name: str) -> Any:
    """The grids, the encoder's first."""
    from megatron_mimo.topology import Layout, ModuleGridSpec

    encoder = ModuleGridSpec(name="encoder", **LAYOUTS[name][0])
    llm = ModuleGridSpec(name="llm", offset=encoder.size, **LAYOUTS[name][1])
    return Layout.of(encoder, llm, world_size=encoder.size + llm.size)


def compute(given: dict[str, Any]) -> dict[str, Any]:
    """Steps of real models; the sides run in turns."""
    import torch
    import torch.distributed as dist

    from megatron_mimo.data import ByteTokenizer

    layout, sides = layout_of(given["layout"]), {}
    data, tokens = drawn(layout, given["pixels"])
    resting = memory("VmRSS")
    if "ours" in given["sides"]:
        sides["ours"] = our_step(layout, data)
    if "peer" in given["sides"]:
        from benchlib.peer_step import PeerStep
        from megatron.core.optimizer import OptimizerConfig

        from megatron_mimo.runtime import seed_everything
        from megatron_mimo.topology.groups import build_topology

        seed_everything(1, tp_rank=0, pp_rank=0, dp_rank=0)
        peer = PeerStep(
            build_topology(layout),
            architecture(),
            vocab_size=ByteTokenizer.vocab_size,
            seq_length=SEQ_LENGTH,
            image_token_id=ByteTokenizer().placeholder_ids["encoder"],
            optimizer=OptimizerConfig(
                optimizer="adam", lr=1e-4, clip_grad=1.0, use_distributed_optimizer=True
            ),
        )
        sides["peer"] = lambda: peer.run(data.microbatches, tokens)
    found: dict[str, dict[str, Any]] = {side: {"cpu": [], "wall": []} for side in sides}
    for repetition in range(given["warm_up"] + given["repetitions"]):
        for side in turns(tuple(sides), repetition):
            own_memory(side)
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            sides[side]()
            spent = torch.tensor([time.process_time() - cpu], dtype=torch.float64)
            wall = time.perf_counter() - wall
            dist.all_reduce(spent)
            if repetition >= given["warm_up"]:
                found[side]["cpu"].append(float(spent))
                found[side]["wall"].append(wall)
    peak = torch.tensor([memory("VmHWM") - resting])
    dist.all_reduce(peak)
    for side in sides:
        found[side]["peak"] = int(peak)
    return found


SEQ_LENGTH = 640


def architecture() -> Any:
    """Both sides' layers: four of width 256 and two of width 128."""
    from megatron_mimo.config.presets import model_config

    return model_config(
        "mock",
        [
            "language.num_layers=4",
            "language.hidden_size=256",
            "language.num_attention_heads=8",
            "language.num_query_groups=8",
            "language.ffn_hidden_size=1024",
        ],
    )


def drawn(layout: Any, pixels: int) -> tuple[Any, int]:
    """One step's samples of this rank, four microbatches a lane, two square images each."""
    import numpy as np
    import torch.distributed as dist

    from megatron_mimo.data import ByteTokenizer, DataConfig, RawSample, data_role
    from megatron_mimo.data.loader.stream_loader import build_list_loader
    from megatron_mimo.media.images import ImageInput

    random, shape = np.random.default_rng(5), (pixels, pixels, 3)
    samples = [
        RawSample.asking(
            key=str(i),
            question="<image> and <image>: which one?",
            answer=f"the answer to question number {i} is the first image",
            items={
                "encoder": tuple(random.integers(0, 256, shape, dtype=np.uint8) for _ in range(2))
            },
        )
        for i in range(4)
    ]
    config = DataConfig(
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        global_batch_size=4 * layout.num_lanes,
        inputs={
            "encoder": ImageInput(
                config=architecture().part("vision").image_config(max_patches=1024)
            )
        },
    )
    role = data_role(layout, dist.get_rank())
    data = build_list_loader(samples, config, role, ByteTokenizer()).next_step()
    return data, 4 * layout.num_lanes * len(f"{samples[0].answer}#")


def our_step(layout: Any, data: Any) -> Any:
    """One call of it trains one step on the given samples."""
    import torch

    from megatron_mimo.data import ByteTokenizer
    from megatron_mimo.model.config import Frozen
    from megatron_mimo.model.mimo import BuildConfig
    from megatron_mimo.optim.config import AdamConfig, ScheduleConfig
    from megatron_mimo.runtime import Device
    from megatron_mimo.training.runner import StepConfig, build_runner
    from megatron_mimo.training.step import train_step

    class Given:
        def next_step(self) -> Any:
            return data

    engine = build_runner(
        layout,
        architecture(),
        Frozen(),
        BuildConfig(
            params_dtype=torch.float32,
            seed=1,
            init="megatron",
            vocab_size=ByteTokenizer.vocab_size,
            seq_length=SEQ_LENGTH,
            sequence_parallel=False,
        ),
        AdamConfig(
            lr=1e-4, min_lr=0.0, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-8, clip_grad=1.0
        ),
        ScheduleConfig(style="constant", warmup_samples=0, decay_samples=1000),
        StepConfig(placeholder_ids=ByteTokenizer().placeholder_ids),
        device=Device("cpu"),
    )
    return lambda: train_step(engine, Given(), 1, 4 * layout.num_lanes)


def emulated(given: dict[str, Any]) -> dict[str, Any]:
    """Steps of waits."""
    from benchlib.emulated import BACKWARD, our_emulated, peer_emulated

    from megatron_mimo.topology.groups import build_topology

    layout = layout_of(given["layout"])
    topology = build_topology(layout)
    found: dict[str, Any] = {"ours": [], "peer": [], "critical": 0.0, "bound": 0.0}
    for draw in range(DRAWS if given["kind"] == "varying" else 1):
        waits = draws(layout, given["kind"], draw)
        ours, critical = our_emulated(topology, waits, RUN_AHEAD)
        times = in_turns(ours, peer_emulated(topology, waits), given["repetitions"])
        found["critical"] += critical
        # The language model's own compute: its busiest rank never waits.
        found["bound"] += max((1 + BACKWARD) * sum(waits[rank]) for rank in layout.target.ranks)
        for side, seconds in times.items():
            found[side].append(seconds)
    # Seconds of all draws together, by repetition.
    for side in ("ours", "peer"):
        found[side] = [sum(times) for times in zip(*found[side], strict=True)]
    return found


def draws(layout: Any, kind: str, draw: int) -> dict[int, list[float]]:
    """Rank -> seconds of each microbatch's forward; a backward takes twice that."""
    import numpy as np

    encoder = ENCODER_SHARE * FORWARD_S
    waits = {}
    for rank in range(layout.world_size):
        random = np.random.default_rng(100 * draw + rank)
        if rank not in layout.modules["encoder"].ranks:
            waits[rank] = [FORWARD_S / layout.target.pp] * MICROBATCHES
        elif kind == "steady":
            waits[rank] = [encoder] * MICROBATCHES
        else:
            # Mean of a lognormal: exp(mu + sigma^2 / 2).
            mu = np.log(encoder) - SIGMA**2 / 2
            waits[rank] = random.lognormal(mu, SIGMA, MICROBATCHES).tolist()
    return waits


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


if __name__ == "__main__":
    run_benchmark(__doc__, measure, threads=1)
