"""A whole training step: ours against megatron-core's MimoModel, schedule and MimoOptimizer.

- *compute*: the same layers, sizes and samples, in fp32. Four ranks keep two cores busy whatever
  the schedule, so what counts is the CPU time that all ranks spend, and the memory that they take.
- *emulated*: forwards and backwards are waits, so that two cores can show overlap. Rows and their
  gradients cross for real. The language model's forward takes 20 ms and its backward 40; the
  encoder's take 0.7 of that, always or on average (lognormal, sigma 1, three draws of a step, the
  same for both). Ours is also held against the critical path of its schedule under these draws.

    python benchmarks/bench_step.py [--quick] [--json FILE]
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchlib.ranks import answer, in_turns, is_rank, run_ranks, task
from benchlib.report import Row, arguments, median_ratio, show, write

LAYOUTS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
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


def main() -> None:
    """Run every case and print the comparison."""
    flags = arguments(__doc__.splitlines()[0])
    rows: list[Row] = []
    for name in ("2 to 2",) if flags.quick else ("2 to 2", "1 to 2"):
        rows += compute_rows(name, 3 if flags.quick else 7)
    for name in ("1 to 1",) if flags.quick else LAYOUTS:
        for kind in ("steady", "varying"):
            rows += emulated_rows(name, kind, 3)
    show(__doc__.splitlines()[0], rows)
    write(rows, flags.json)


def compute_rows(name: str, repetitions: int) -> Iterator[Row]:
    """CPU time and memory of real compute."""
    given = {"what": "compute", "layout": name, "repetitions": repetitions}
    size = num_ranks(name)
    found = run_ranks(__file__, size, given | {"sides": ["ours", "peer"]})
    for unit, key, target in (("CPU s", "cpu", 0.8), ("s", "wall", None)):
        ours, peer = median_ratio(found["ours"][key], found["peer"][key])
        label = f"compute: {name}, {'CPU time of all ranks' if key == 'cpu' else 'wall time'}"
        yield Row(case=label, ours=ours, peer=peer, target=target, unit=unit)
    peaks = {}
    for side in ("ours", "peer"):
        peaks[side] = run_ranks(__file__, size, given | {"sides": [side]})[side]["peak"]
    yield Row(
        case=f"compute: {name}, peak memory of all ranks",
        ours=peaks["ours"] / 2**20,
        peer=peaks["peer"] / 2**20,
        target=1.0,
        unit="MiB",
    )


def emulated_rows(name: str, kind: str, repetitions: int) -> Iterator[Row]:
    """Wall time where compute is a wait."""
    given = {"what": "emulated", "layout": name, "kind": kind, "repetitions": repetitions}
    found = run_ranks(__file__, num_ranks(name), given)
    ours, peer = median_ratio(found["ours"], found["peer"])
    yield Row(
        case=f"emulated: {name}, {kind} encoder, against the critical path",
        ours=ours,
        peer=found["critical"],
        target=1.05,
        unit="s",
    )
    yield Row(
        case=f"emulated: {name}, {kind} encoder, against the peer",
        ours=ours,
        peer=peer,
        target=0.85 if kind == "varying" else None,
        unit="s",
    )


def num_ranks(name: str) -> int:
    """Ranks of a layout."""
    encoder, llm = LAYOUTS[name]
    return encoder.get("dp", 1) + llm.get("dp", 1) * llm.get("pp", 1)


def layout_of(name: str) -> Any:
    """The grids, the encoder's first."""
    from megatron_mimo.topology import Layout, ModuleGridSpec

    encoder = ModuleGridSpec(name="encoder", **LAYOUTS[name][0])
    llm = ModuleGridSpec(name="llm", offset=encoder.size, **LAYOUTS[name][1])
    return Layout(encoder=encoder, llm=llm, world_size=encoder.size + llm.size)


def work() -> None:
    """Measure on this rank."""
    from megatron_mimo.runtime import initialize, shutdown

    initialize("cpu")
    given = task()
    answer(compute(given) if given["what"] == "compute" else emulated(given))
    shutdown()


def compute(given: dict[str, Any]) -> dict[str, Any]:
    """Steps of real models; the sides run in turns."""
    import torch
    import torch.distributed as dist

    from megatron_mimo.data import ByteTokenizer
    from megatron_mimo.runtime.host.memory import keep_freed_memory, return_freed_memory

    layout, sides = layout_of(given["layout"]), {}
    data, tokens = drawn(layout)
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
            image_token_id=ByteTokenizer.image_token_id,
            optimizer=OptimizerConfig(
                optimizer="adam", lr=1e-4, clip_grad=1.0, use_distributed_optimizer=True
            ),
        )
        sides["peer"] = lambda: peer.run(data.microbatches, tokens)
    found: dict[str, dict[str, Any]] = {side: {"cpu": [], "wall": []} for side in sides}
    for repetition in range(given["repetitions"] + 2):
        for side, step in sides.items():
            # Keeping memory is ours; the peer gets it as it comes.
            (keep_freed_memory if side == "ours" else return_freed_memory)()
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            spent = torch.tensor([time.process_time() - cpu], dtype=torch.float64)
            wall = time.perf_counter() - wall
            dist.all_reduce(spent)
            if repetition > 1:
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
    from megatron_mimo.presets import model_config

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


def drawn(layout: Any) -> tuple[Any, int]:
    """One step's samples of this rank, four microbatches a lane, two images of 256 rows each."""
    import numpy as np
    import torch.distributed as dist

    from megatron_mimo.data import ByteTokenizer, DataConfig, RawSample
    from megatron_mimo.data.loader import build_list_loader
    from megatron_mimo.training.engine import data_role

    random = np.random.default_rng(5)
    samples = [
        RawSample.asking(
            key=str(i),
            question="<image> and <image>: which one?",
            answer=f"the answer to question number {i} is the first image",
            images=tuple(random.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(2)),
        )
        for i in range(4)
    ]
    config = DataConfig(
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        global_batch_size=4 * layout.num_lanes,
        image=architecture().vision.image_config(max_patches=1024),
    )
    role = data_role(layout, dist.get_rank())
    data = build_list_loader(samples, config, role, ByteTokenizer()).next_step()
    return data, 4 * layout.num_lanes * len(f"{samples[0].answer}#")


def our_step(layout: Any, data: Any) -> Any:
    """One call of it trains one step on the given samples."""
    import torch

    from megatron_mimo.data import ByteTokenizer
    from megatron_mimo.model.config import FreezeConfig
    from megatron_mimo.model.mimo import BuildConfig
    from megatron_mimo.optim.config import AdamConfig, ScheduleConfig
    from megatron_mimo.runtime import Device
    from megatron_mimo.training.engine import build_engine
    from megatron_mimo.training.step import train_step

    class Given:
        def next_step(self) -> Any:
            return data

    engine = build_engine(
        layout,
        architecture(),
        FreezeConfig(),
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
        run_ahead=1,
        check_bridge=False,
        image_token_id=ByteTokenizer.image_token_id,
        validate_data=True,
        device=Device("cpu"),
    )
    return lambda: train_step(engine, Given(), 1, 4 * layout.num_lanes)


def emulated(given: dict[str, Any]) -> dict[str, Any]:
    """Steps of waits."""
    from benchlib.emulated import our_emulated, peer_emulated

    from megatron_mimo.topology.groups import build_topology

    layout = layout_of(given["layout"])
    topology = build_topology(layout)
    found: dict[str, Any] = {"ours": [], "peer": [], "critical": 0.0}
    for draw in range(DRAWS if given["kind"] == "varying" else 1):
        waits = draws(layout, given["kind"], draw)
        ours, critical = our_emulated(topology, waits, RUN_AHEAD)
        mine, theirs = in_turns(ours, peer_emulated(topology, waits), given["repetitions"])
        found["critical"] += critical
        found["ours"].append(mine)
        found["peer"].append(theirs)
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
        if rank not in layout.encoder.ranks:
            waits[rank] = [FORWARD_S / layout.llm.pp] * MICROBATCHES
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
    work() if is_rank() else main()
